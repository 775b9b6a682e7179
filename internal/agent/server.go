package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
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
// new one ends what the last one left running, but for the lasting commands.
type Server struct {
	h        Handler
	epoch    string
	patience patience

	mu      sync.Mutex
	out     *outbox // nil while not serving
	session uint32  // 0: no host
	streams map[uint32]*execution
	execs   map[*execution]bool // all, also those that have no stream
	past    []string            // the lasting ones that were forgotten last
	ready   bool
	state   []report // the newest of each kind
	seq     uint64
	acked   uint64
	changed chan struct{} // closed at the next ack or end of session
	running sync.WaitGroup
	lasting sync.WaitGroup // is not waited for: they and Main outlive the conversation
}

const (
	// maxExecs bounds the commands that run at once for a host.
	maxExecs = 64
	// maxPast is how many IDs of lasting commands are remembered, so that one is not
	// run twice.
	maxPast = 256
)

// NewServer makes a server; Serve gives it a stream.
func NewServer(h Handler) *Server {
	return &Server{
		h: h, epoch: rand.Text(), patience: patient,
		streams: map[uint32]*execution{}, execs: map[*execution]bool{}, changed: make(chan struct{}),
	}
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
			if errors.Is(err, io.EOF) { // nobody will come any more
				for x := range s.execs {
					x.abandon()
				}
			}
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

// drop ends the commands of a host that has gone, or has them wait for the next one;
// s.mu is held.
func (s *Server) drop() {
	if s.session == 0 {
		return
	}
	s.session = 0
	s.wake()
	s.out.purge()
	clear(s.streams)
	for x := range s.execs {
		x.leave(s.patience.host)
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
	case kindDetach:
		if x := s.streams[f.stream]; x != nil {
			delete(s.streams, f.stream)
			x.leave(s.patience.client)
		}
	case kindData, kindEOF, kindCredit, kindControl, kindCancel:
		if x := s.streams[f.stream]; x != nil {
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
	for x := range s.execs {
		x.leave(s.patience.others)
	}
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
	case r.runs() && s.streams[f.stream] == nil:
		if err := s.exec(f.stream, r); err != nil {
			s.answer(f.stream, result{Code: 126, Error: err.Error(), Unknown: errors.Is(err, ErrUnknown)})
		}
	default:
		s.answer(f.stream, result{Code: 126, Error: "unknown request " + r.Op})
	}
}

// runs says whether the request is for a command, or for a port.
func (r request) runs() bool {
	switch c := r.Command; {
	case c == nil:
		return false
	case r.Op == "dial":
		return c.Port != 0 && c.ID == "" && r.Resume == nil
	default:
		return r.Op == "exec" && c.Port == 0
	}
}

func (s *Server) answer(stream uint32, r result) {
	s.out.send(frame{session: s.session, stream: stream, kind: kindResult, payload: encode(r)})
}

// exec takes up the lasting command that is asked for, or starts a command; s.mu is
// held.
func (s *Server) exec(stream uint32, r request) error {
	l := &link{out: s.out, session: s.session, stream: stream}
	running := 0
	for x := range s.execs {
		if r.Command.ID != "" && x.id == r.Command.ID {
			return s.join(x, l, r)
		}
		if !x.hasEnded() {
			running++
		}
	}
	switch {
	case r.Resume != nil, slices.Contains(s.past, r.Command.ID):
		return ErrUnknown
	case running >= maxExecs || len(s.execs) >= 4*maxExecs:
		return errors.New("too many commands at once")
	}
	x := newExecution(s, *r.Command, l)
	s.streams[stream] = x
	s.execs[x] = true
	if x.id != "" {
		l.send(kindJoined, 0, encode(x.in.rejoined()))
	}
	life := &s.running
	if x.id != "" || r.Command.Main {
		life = &s.lasting
	}
	life.Go(func() { x.run(*r.Command, r.Stdin) })
	return nil
}

func (s *Server) join(x *execution, l *link, r request) error {
	from := r.Resume
	if from == nil { // a start that nobody has heard of
		from = &Resumption{}
	}
	if err := x.join(l, *from); err != nil {
		return err
	}
	// Its terminal may have become another's, or what was said of it been lost.
	x.control(control{Rows: r.Command.Rows, Cols: r.Command.Cols})
	maps.DeleteFunc(s.streams, func(_ uint32, other *execution) bool { return other == x })
	s.streams[l.stream] = x
	return nil
}

// remove forgets a command.
func (s *Server) remove(x *execution) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.execs, x)
	maps.DeleteFunc(s.streams, func(_ uint32, other *execution) bool { return other == x })
	if x.id != "" {
		s.past = append(s.past, x.id)
		s.past = s.past[max(0, len(s.past)-maxPast):]
	}
}
