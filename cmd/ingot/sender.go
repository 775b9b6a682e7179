package main

import (
	"context"
	"fmt"
	"sync/atomic"

	ingotv1 "ingot/api/ingot/v1"
)

// sender is the sending side of one connection of a command. gRPC's streams have one
// sender, which may be held up: signals are counted, and given up after, by somebody
// else.
type sender struct {
	*remote
	stream  ingotv1.Host_ExecClient
	fresh   bool          // the command has had nothing before
	joined  chan uint64   // of another one: how much of what was typed the guest has
	arrived chan struct{} // output, which can be confirmed
	taken   atomic.Int64  // bytes of stdin that the guest has had over this connection
	more    chan struct{} // taken has grown

	at   uint64 // how much of what was typed has been sent, by this connection or another
	sent int64  // by this one
	eof  bool   // so was its end
}

func newSender(r *remote, stream ingotv1.Host_ExecClient, fresh bool) *sender {
	return &sender{
		remote: r, stream: stream, fresh: fresh,
		joined: make(chan uint64, 1), more: make(chan struct{}, 1), arrived: make(chan struct{}, 1),
	}
}

const (
	// stdinWindow is how much of stdin may be on its way (ExecResponse.stdin_taken).
	stdinWindow = 256 << 10
	// mostKept is how much of what was typed is kept for another connection: what may be
	// on its way, and what the guest may hold without having said so.
	mostKept = 2 * stdinWindow
)

// join says where the guest wants to go on. Of a fresh command that is known.
func (s *sender) join(at uint64) {
	if s.fresh {
		return
	}
	select {
	case s.joined <- at:
	default: // once is enough
	}
}

// took notes that the guest has so much more.
func (s *sender) took(n int64) {
	s.taken.Add(n)
	wake(s.more)
}

// always can be received from.
var always = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// run sends until ctx ends, no more of what is typed than the guest takes: else a
// signal would wait behind it. The end of the stream tells the guest that nobody will
// come back. An error means that the guest is wrong.
func (s *sender) run(ctx context.Context) error {
	defer s.stream.CloseSend()
	joined := s.fresh
	for {
		var typed <-chan []byte
		var rest <-chan struct{} // of what was typed before
		switch {
		case !joined || s.sent-s.taken.Load() >= stdinWindow:
		case s.at < s.from+uint64(len(s.input)) || s.inputEnded && !s.eof:
			rest = always
		case !s.inputEnded:
			typed = s.typed
		}
		var r *ingotv1.ExecRequest
		select {
		case <-ctx.Done():
			return nil
		case s.at = <-s.joined:
			if s.at < s.from || s.at > s.from+uint64(len(s.input)) {
				return fmt.Errorf("the guest wants its input from byte %d on: there is that from %d to %d", s.at, s.from, s.from+uint64(len(s.input)))
			}
			joined = true
			continue
		case <-s.more:
			continue
		case b, ok := <-typed:
			s.keep(b, !ok)
			continue
		case <-s.arrived:
			r = &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Received{
				Received: &ingotv1.ExecReceived{Stdout: s.stdout.Load(), Stderr: s.stderr.Load()}}}
		case r = <-s.controls:
		case <-rest:
			r = s.next()
		}
		if send(s.stream, r) != nil {
			return nil // receive has the reason
		}
	}
}

// keep notes what was typed, and forgets what the guest must have by now.
func (r *remote) keep(b []byte, ended bool) {
	r.input = append(r.input, b...)
	r.inputEnded = ended
	if extra := len(r.input) - mostKept; extra > mostKept {
		r.input = append(r.input[:0], r.input[extra:]...)
		r.from += uint64(extra)
	}
}

// next is the next part of what is kept, or its end.
func (s *sender) next() *ingotv1.ExecRequest {
	b := s.input[s.at-s.from:]
	if len(b) == 0 {
		s.eof = true
		return &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_StdinEof{StdinEof: true}}
	}
	b = b[:min(len(b), 32<<10)]
	s.at += uint64(len(b))
	s.sent += int64(len(b))
	return &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Stdin{Stdin: b}}
}
