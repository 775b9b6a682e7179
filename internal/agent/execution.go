package agent

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// execution is a command that the server runs for a host.
type execution struct {
	s       *Server
	session uint32
	stream  uint32
	in      *inbox
	out     [2]*credit // stdout, stderr
	cancel  chan struct{}
	once    sync.Once
	main    bool

	mu       sync.Mutex
	process  *Process // nil until started
	terminal *os.File // with a TTY
	early    []control
}

// grace is what a command has between the hang-up of its terminal and its end,
// when its host has gone.
const grace = 2 * time.Second

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
func (x *execution) run(out *outbox, cmd Command, hasStdin bool) {
	r := x.execute(out, cmd, hasStdin)
	x.s.finished(x, r)
	if x.main && x.s.h.Ended != nil {
		x.s.h.Ended(r.Code)
	}
}

func (x *execution) execute(out *outbox, cmd Command, hasStdin bool) result {
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
	input.Go(func() { x.feed(out, p.in, cmd.TTY) })
	for i, f := range p.out {
		if f != nil {
			copies.Go(func() { x.drain(out, f, i) })
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

// abandon ends the command for want of a host.
func (x *execution) abandon() {
	x.once.Do(func() { close(x.cancel) })
	x.in.end(io.EOF)
	for _, c := range x.out {
		c.fail(ErrDetached)
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
		if f.channel == stdout || f.channel == stderr {
			x.out[f.channel-stdout].grant(f.payload)
		}
	case kindCancel:
		x.abandon()
	case kindControl:
		var c control
		if json.Unmarshal(f.payload, &c) != nil {
			return
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.process == nil {
			if len(x.early) < 16 {
				x.early = append(x.early, c)
			}
			return
		}
		x.apply(c)
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

// feed gives the command its input. A terminal's end of input is ^D.
func (x *execution) feed(out *outbox, w *os.File, tty bool) {
	buf := make([]byte, maxPayload)
	for {
		n, err := x.in.read(buf)
		if err != nil {
			if tty {
				w.Write([]byte{4})
			} else {
				w.Close()
			}
			return
		}
		if _, err := w.Write(buf[:n]); err != nil {
			x.in.end(err)
			return // the command reads no more, or is gone
		}
		if c := x.in.used(n); c != nil {
			out.send(frame{session: x.session, stream: x.stream, kind: kindCredit, channel: stdin, payload: c})
		}
	}
}

// drain sends the command's output. What has no host to go to is read all the
// same: the process of a guest does not stand still for want of a listener. After the command's end, which the read
// deadline tells, it sends what is left in the pipe and does not wait for
// children that keep it open.
func (x *execution) drain(out *outbox, r *os.File, i int) {
	buf := make([]byte, maxPayload)
	read := r.Read
	for {
		n, err := read(buf)
		for b := buf[:n]; len(b) > 0; {
			m, err := x.out[i].take(len(b))
			if err == nil {
				err = out.data(frame{session: x.session, stream: x.stream, kind: kindData, channel: uint8(stdout + i), payload: b[:m]})
			}
			if err != nil && !x.main {
				return
			}
			if err != nil {
				break
			}
			b = b[m:]
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			read = func(b []byte) (int, error) { return readNow(r, b) }
		} else if err != nil {
			out.send(frame{session: x.session, stream: x.stream, kind: kindEOF, channel: uint8(stdout + i)})
			return
		}
	}
}

// readNow reads what is there, whatever the deadline.
func readNow(r *os.File, b []byte) (int, error) {
	raw, err := r.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) { n, err = syscall.Read(int(fd), b) }); cerr != nil {
		return 0, cerr
	}
	if n <= 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}
