package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// execution is a command that the server runs for a host.
type execution struct {
	s      *Server
	id     string // of a lasting one
	in     *inbox
	cancel chan struct{} // closed once nobody wants it any more
	main   bool

	mu       sync.Mutex // guards what follows
	room     sync.Cond  // there is room in an output, or canceled
	link     *link      // nil while nobody is there for it
	out      [2]output  // stdout, stderr
	canceled bool
	process  *Process // nil until started
	terminal *os.File // with a TTY
	early    []control
	end      *result
	alone    *time.Timer // of a lasting one that has nobody, or has ended
}

// link is the stream on which a host has an execution.
type link struct {
	out             *outbox
	session, stream uint32
}

func (l *link) send(k kind, channel uint8, payload []byte) {
	l.out.send(frame{session: l.session, stream: l.stream, kind: k, channel: channel, payload: payload})
}

// grace is what a command has between being hung up on and its end.
const grace = 2 * time.Second

// patience is how long a lasting command waits for somebody to take it up.
type patience struct {
	client time.Duration // while its host is there; for its end to be confirmed, too
	others time.Duration // after another host has come
	host   time.Duration // while none is there
}

var patient = patience{client: 10 * time.Second, others: 30 * time.Second, host: 5 * time.Minute}

func newExecution(s *Server, cmd Command, l *link) *execution {
	x := &execution{s: s, id: cmd.ID, in: newInbox(), cancel: make(chan struct{}), link: l}
	x.room.L = &x.mu
	return x
}

// pipes are one command's streams: the command's own ends and ours.
type pipes struct {
	child [3]*os.File
	in    *os.File
	out   [2]*os.File // the second is nil with a TTY
}

func (p *pipes) closeChild() {
	for _, f := range p.child {
		f.Close() // a TTY's three are one; closing it again does nothing
	}
}

func newPipes(cmd Command) (*pipes, error) {
	if cmd.TTY {
		master, slave, err := openTerminal(cmd.Rows, cmd.Cols)
		if err != nil {
			return nil, err
		}
		return &pipes{child: [3]*os.File{slave, slave, slave}, in: master, out: [2]*os.File{master}}, nil
	}
	var read, write [3]*os.File
	for i := range read {
		var err error
		if read[i], write[i], err = os.Pipe(); err != nil {
			for j := range i {
				err = errors.Join(err, read[j].Close(), write[j].Close())
			}
			return nil, err
		}
	}
	return &pipes{
		child: [3]*os.File{read[0], write[1], write[2]},
		in:    write[0],
		out:   [2]*os.File{read[1], read[2]},
	}, nil
}

// run starts the command, moves its bytes, and reports its end.
func (x *execution) run(cmd Command, hasStdin bool) {
	r := x.execute(cmd, hasStdin)
	x.finish(r)
	x.s.remove(x)
	if x.main && x.s.h.Ended != nil {
		x.s.h.Ended(r.Code)
	}
}

// finish reports the end. That of a lasting command is kept until it is confirmed.
func (x *execution) finish(r result) {
	x.mu.Lock()
	x.end = &r
	x.send(kindResult, 0, encode(r))
	kept := x.id != "" && !x.canceled
	if kept && x.link != nil {
		x.await(x.s.patience.client)
	}
	x.mu.Unlock()
	if kept {
		<-x.cancel
	}
}

func (x *execution) execute(cmd Command, hasStdin bool) result {
	if cmd.Port != 0 {
		return x.relay(cmd.Port)
	}
	if x.s.h.Command != nil {
		var err error
		if cmd, err = x.s.h.Command(cmd); err != nil {
			return failure(err)
		}
	}
	x.main = cmd.Main
	p, err := newPipes(cmd)
	if err != nil {
		return failure(err)
	}
	process, err := x.s.h.Reaper.Start(cmd, p.child)
	p.closeChild()
	var copies, input sync.WaitGroup
	defer func() {
		x.in.end(io.EOF)
		p.in.Close()
		input.Wait()
		for _, f := range p.out {
			f.Close() // nil and closed ones say so, and that is all
		}
	}()
	if err != nil {
		return failure(err)
	}
	if x.main && x.s.h.Started != nil {
		x.s.h.Started(process)
	}
	x.started(process, cmd, p)
	if !hasStdin {
		x.in.end(io.EOF)
	}
	input.Go(func() { x.feed(p.in, endOfInput(cmd)) })
	for i, f := range p.out {
		if f != nil {
			copies.Go(func() { x.drain(f, i) })
		}
	}
	x.wait(process)
	for _, f := range p.out {
		if f != nil {
			f.SetReadDeadline(time.Unix(1, 0)) // what is there is still read, see drain
		}
	}
	copies.Wait()
	return result{Code: process.Code()}
}

func failure(err error) result {
	var e *Error
	if errors.As(err, &e) {
		return result{Code: e.Code, Error: e.Text}
	}
	return result{Code: 126, Error: err.Error()}
}

// started makes the process known to control frames, and does what came early.
func (x *execution) started(process *Process, cmd Command, p *pipes) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.process = process
	if cmd.TTY {
		x.terminal = p.in
	}
	for _, c := range x.early {
		x.apply(c)
	}
	x.early = nil
}

// wait waits for the command's end. If its host goes first, it is hung up on,
// and then killed.
func (x *execution) wait(process *Process) {
	select {
	case <-process.Done():
		return
	case <-x.cancel:
	}
	if x.main { // it is the guest's, not its host's
		<-process.Done()
		return
	}
	syscall.Kill(-process.PID, syscall.SIGHUP)
	syscall.Kill(-process.PID, syscall.SIGCONT)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-process.Done():
	case <-timer.C:
		syscall.Kill(-process.PID, syscall.SIGKILL)
		<-process.Done()
	}
}

// abandon ends the command for want of somebody who wants it, or forgets its end.
func (x *execution) abandon() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.canceled {
		return
	}
	x.canceled = true
	x.room.Broadcast()
	close(x.cancel)
	x.in.end(io.EOF)
}

// await gives somebody d to come for a lasting command; x.mu is held.
func (x *execution) await(d time.Duration) {
	if x.alone != nil {
		x.alone.Stop()
	}
	x.alone = time.AfterFunc(d, func() {
		x.mu.Lock()
		taken := x.link != nil && x.end == nil
		x.mu.Unlock()
		if !taken {
			x.abandon()
		}
	})
}

// leave is told that nobody is there for the command any more. One that lasts has d
// to be taken up.
func (x *execution) leave(d time.Duration) {
	if x.id == "" {
		defer x.abandon()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.link = nil
	if x.id != "" {
		x.await(d)
	}
}

// join gives a lasting command to the stream l, whose client has had so much of its
// output. The stream that had it before is told.
func (x *execution) join(l *link, from Resumption) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.canceled {
		return ErrUnknown
	}
	had := [2]uint64{from.Stdout, from.Stderr}
	for i, n := range had {
		if !x.out[i].has(n) {
			return fmt.Errorf("%w: its output is there from byte %d on, and byte %d was asked for", ErrUnknown, x.out[i].start, n)
		}
	}
	x.send(kindResult, 0, encode(result{Code: 126, Error: "somebody else has taken the command up"}))
	x.link = l
	if x.alone != nil {
		x.alone.Stop()
	}
	x.send(kindJoined, 0, encode(x.in.rejoined()))
	for i, n := range had {
		out := &x.out[i]
		out.confirm(n - out.start)
		for b := range slices.Chunk(out.buf, maxPayload) {
			x.send(kindData, uint8(stdout+i), b)
		}
		if out.ended {
			x.send(kindEOF, uint8(stdout+i), nil)
		}
	}
	if x.end != nil {
		x.send(kindResult, 0, encode(*x.end))
		x.await(x.s.patience.client)
	}
	x.room.Broadcast()
	return nil
}

func (x *execution) hasEnded() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.end != nil
}

// send sends a frame if somebody is there for it; x.mu is held.
func (x *execution) send(k kind, channel uint8, payload []byte) {
	if x.link != nil {
		x.link.send(k, channel, payload)
	}
}

// handle acts on a frame of this stream. It never blocks.
func (x *execution) handle(f frame) {
	switch f.kind {
	case kindData:
		if !x.in.push(f.payload) {
			x.abandon()
		}
	case kindEOF:
		x.in.end(io.EOF)
	case kindCredit:
		if i := int(f.channel) - stdout; (i == 0 || i == 1) && len(f.payload) == 4 {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.out[i].confirm(uint64(binary.BigEndian.Uint32(f.payload)))
			x.room.Broadcast()
		}
	case kindCancel:
		x.abandon()
	case kindControl:
		var c control
		if json.Unmarshal(f.payload, &c) == nil {
			x.control(c)
		}
	}
}

// control resizes or signals, at once or when there is a process.
func (x *execution) control(c control) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.process != nil {
		x.apply(c)
	} else if len(x.early) < 16 {
		x.early = append(x.early, c)
	}
}

// apply resizes or signals; x.mu is held.
func (x *execution) apply(c control) {
	if c.Signal > 0 {
		select {
		case <-x.process.Done(): // its number may be another's by now
		default:
			syscall.Kill(-x.process.PID, syscall.Signal(c.Signal))
		}
	}
	if x.terminal == nil {
		return
	}
	if raw, err := x.terminal.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { resize(int(fd), c.Rows, c.Cols) })
	}
}

// endOfInput tells a command that there is no more. A terminal's is ^D.
func endOfInput(cmd Command) func(*os.File) {
	if cmd.TTY {
		return func(w *os.File) { w.Write([]byte{4}) }
	}
	return func(w *os.File) { w.Close() }
}

// feed gives the command its input, and then end.
func (x *execution) feed(w *os.File, end func(*os.File)) {
	buf := make([]byte, maxPayload)
	for {
		n, err := x.in.read(buf)
		if err != nil {
			end(w)
			return
		}
		if _, err := w.Write(buf[:n]); err != nil {
			x.in.end(err)
			return // the command reads no more, or is gone
		}
		x.mu.Lock()
		if c := x.in.used(n); c != nil {
			x.send(kindCredit, stdin, c)
		}
		x.mu.Unlock()
	}
}
