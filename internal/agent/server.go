package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

// Handler is what a guest's program does for its server. Its functions must
// return soon and not call the server.
type Handler struct {
	Reaper *Reaper
	Info   func() Info // Ready and Epoch are the server's to fill in
	// Command, if there is one, completes a command with what the guest knows: of
	// Main, what it is. Started is told of Main's process and Ended of its end, when
	// all of its output has been sent.
	Command func(Command) (Command, error)
	Started func(*Process)
	Ended   func(code int)
	// Shutdown begins to power off, or to restart, and returns.
	Shutdown func(reboot bool) error
}

// Server is the guest's end of the conversation. It has one host at a time; a
// new one ends what the last one left running.
type Server struct {
	h     Handler
	epoch string

	mu      sync.Mutex
	out     *outbox // nil while not serving
	session uint32  // 0: no host
	execs   map[uint32]*execution
	ready   bool
	state   []report // the newest of each kind
	seq     uint64
	acked   uint64
	changed chan struct{} // closed at the next ack or end of session
	running sync.WaitGroup
	main    sync.WaitGroup // is not waited for: Main outlives the conversation
}

// maxExecs bounds the commands that run at once for a host.
const maxExecs = 64

// NewServer makes a server; Serve gives it a stream.
func NewServer(h Handler) *Server {
	return &Server{h: h, epoch: rand.Text(), execs: map[uint32]*execution{}, changed: make(chan struct{})}
}

// Serve talks to the hosts at the other end of conn, one after the other, until
// writing fails, or reading with anything but ErrDetached. It returns nil at
// io.EOF.
func (s *Server) Serve(conn io.ReadWriter) error {
	out := newOutbox(conn, 0, nil) // a guest trusts its host
	s.mu.Lock()
	s.out = out
	s.announce()
	s.mu.Unlock()
	in := &scanner{r: conn}
	for {
		f, err := in.next()
		switch {
		case errors.Is(err, ErrDetached):
			in.reset()
			s.mu.Lock()
			s.drop()
			// The next host's first bytes may have overtaken the news that it is there,
			// and its session has ended with the last one's. It waits for this one.
			s.announce()
			s.mu.Unlock()
		case err != nil:
			s.mu.Lock()
			s.drop()
			s.mu.Unlock()
			out.close(ErrClosed)
			s.running.Wait()
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		default:
			s.handle(f)
			if err := out.failed(); err != nil {
				s.mu.Lock()
				s.drop()
				s.mu.Unlock()
				s.running.Wait()
				return fmt.Errorf("write to the host: %w", err)
			}
		}
	}
}

// announce says that no session is open; s.mu is held.
func (s *Server) announce() {
	s.out.send(frame{kind: kindAnnounce, payload: encode(greeting{Version: version, Epoch: s.epoch})})
}

// Notify tells the host what happened, now or when there is one.
func (s *Server) Notify(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	r := report{Seq: s.seq, Event: e}
	s.state = append(slices.DeleteFunc(s.state, func(r report) bool { return r.Event.Kind == e.Kind }), r)
	if e.Kind == Ready {
		s.ready = true
	}
	if s.session != 0 {
		s.report(r)
	}
}

// Flush waits until the host has confirmed everything that it was told, has
// gone, or ctx ends.
func (s *Server) Flush(ctx context.Context) error {
	for {
		s.mu.Lock()
		if s.acked >= s.seq || s.session == 0 {
			s.mu.Unlock()
			return nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Server) report(r report) {
	s.out.send(frame{session: s.session, kind: kindEvent, payload: encode(r)})
}

// drop ends the commands of a host that has gone; s.mu is held.
func (s *Server) drop() {
	if s.session == 0 {
		return
	}
	s.session = 0
	s.wake()
	s.out.purge()
	for id, x := range s.execs {
		x.abandon()
		delete(s.execs, id)
	}
}

// wake makes Flush look again; s.mu is held.
func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// handle acts on a frame. It never blocks.
func (s *Server) handle(f frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.kind == kindHello {
		s.welcome(f)
		return
	}
	if f.session == 0 || f.session != s.session {
		return
	}
	switch f.kind {
	case kindOpen:
		s.open(f)
	case kindAck:
		var r report
		if json.Unmarshal(f.payload, &r) == nil {
			s.acked = max(s.acked, min(r.Seq, s.seq))
			s.wake()
		}
	case kindData, kindEOF, kindCredit, kindControl, kindCancel:
		if x := s.execs[f.stream]; x != nil {
			x.handle(f)
		}
	}
}

func (s *Server) welcome(f frame) {
	var g greeting
	if json.Unmarshal(f.payload, &g) != nil || f.session == 0 {
		return
	}
	s.drop()
	s.session = f.session
	s.out.send(frame{session: s.session, kind: kindWelcome, payload: encode(greeting{Version: version, Epoch: s.epoch})})
	for _, r := range s.state {
		s.report(r)
	}
}

func (s *Server) open(f frame) {
	var r request
	if err := json.Unmarshal(f.payload, &r); err != nil {
		s.answer(f.stream, result{Code: 126, Error: "bad request: " + err.Error()})
		return
	}
	switch {
	case r.Op == "info":
		info := s.h.Info()
		info.Ready, info.Epoch = s.ready, s.epoch
		s.answer(f.stream, result{Info: &info})
	case r.Op == "shutdown":
		if err := s.h.Shutdown(r.Reboot); err != nil {
			s.answer(f.stream, result{Code: 1, Error: err.Error()})
			return
		}
		s.answer(f.stream, result{})
	case r.Op == "exec" && r.Command != nil && s.execs[f.stream] == nil:
		if len(s.execs) >= maxExecs {
			s.answer(f.stream, result{Code: 126, Error: "too many commands at once"})
			return
		}
		x := &execution{s: s, session: s.session, stream: f.stream, in: newInbox(),
			out: [2]*credit{newCredit(), newCredit()}, cancel: make(chan struct{})}
		s.execs[f.stream] = x
		out := s.out
		life := &s.running
		if r.Command.Main {
			life = &s.main
		}
		life.Go(func() { x.run(out, *r.Command, r.Stdin) })
	default:
		s.answer(f.stream, result{Code: 126, Error: "unknown request " + r.Op})
	}
}

func (s *Server) answer(stream uint32, r result) {
	s.out.send(frame{session: s.session, stream: stream, kind: kindResult, payload: encode(r)})
}

// finished sends a command's result, unless its host has gone.
func (s *Server) finished(x *execution, r result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.execs[x.stream] == x {
		delete(s.execs, x.stream)
		s.answer(x.stream, r)
	}
}
