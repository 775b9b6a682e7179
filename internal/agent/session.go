package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Session is a command that runs in the guest.
type Session struct {
	c       *Client
	id      uint32
	s       *stream
	outputs sync.WaitGroup
	done    chan struct{}
	code    int
	err     error

	mu        sync.Mutex
	writeErr  error     // the first of Stdout and Stderr
	confirmed [2]uint64 // of a lasting one
}

// Exec starts a command in the guest. Its input is in, which may be nil; a Read
// from it that is in progress when the command ends is the caller's to end. With
// a TTY all output is out's. Either writer may be nil. A writer that stands still
// stops this command only. When ctx ends, the command is killed; a lasting one is let
// go.
func (c *Client) Exec(ctx context.Context, cmd Command, in io.Reader, out, errOut io.Writer) (*Session, error) {
	return c.exec(ctx, request{Op: "exec", Command: &cmd, Stdin: in != nil}, in, out, errOut)
}

// Resume takes up a lasting command that was started before. Its output comes from
// where from says; its input goes on after what Joined says.
func (c *Client) Resume(ctx context.Context, cmd Command, from Resumption, in io.Reader, out, errOut io.Writer) (*Session, error) {
	return c.exec(ctx, request{Op: "exec", Command: &cmd, Stdin: in != nil, Resume: &from}, in, out, errOut)
}

func (c *Client) exec(ctx context.Context, r request, in io.Reader, out, errOut io.Writer) (*Session, error) {
	if len(r.Command.Args) == 0 && !r.Command.Main && r.Command.Port == 0 {
		return nil, errors.New("run in the guest: no command")
	}
	id, s, err := c.open(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("run in the guest: %w", err)
	}
	x := &Session{c: c, id: id, s: s, done: make(chan struct{})}
	if r.Resume != nil {
		x.confirmed = [2]uint64{r.Resume.Stdout, r.Resume.Stderr}
	}
	x.outputs.Go(func() { x.copyOut(out, stdout) })
	x.outputs.Go(func() { x.copyOut(errOut, stderr) })
	if in != nil {
		go x.copyIn(in) // ends with in, or at its first Read after the command's end
	}
	farewell := kindCancel
	if s.lasting {
		farewell = kindDetach
	}
	stop := context.AfterFunc(ctx, func() {
		c.tell(id, farewell, 0, nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.streams, id)
		s.fail(ctx.Err())
	})
	go x.finish(stop) // Wait waits for it
	return x, nil
}

func (x *Session) finish(stop func() bool) {
	defer close(x.done)
	a := <-x.s.answer
	x.outputs.Wait()
	stop()
	x.code, x.err = a.result.Code, a.error()
	if x.err == nil {
		x.err = x.writeErr // outputs are done: no lock needed
	}
	if a.err != nil {
		x.code = -1
	}
}

// Wait waits for the command's end and returns its exit code: 128 plus the
// signal's number if a signal ended it, -1 if that is not known. An *Error
// means that it did not start.
func (x *Session) Wait() (int, error) {
	<-x.done
	return x.code, x.err
}

// Done is closed when Wait would not block.
func (x *Session) Done() <-chan struct{} { return x.done }

// Lasting says whether another conversation can take the command up: it was asked for
// so, and the guest is able to.
func (x *Session) Lasting() bool { return x.s.lasting }

// Joined waits until the guest has a lasting command, and says how many bytes of input
// that has had.
func (x *Session) Joined(ctx context.Context) (stdin uint64, err error) {
	select {
	case n := <-x.s.joined:
		return n, nil
	case <-x.done:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case n := <-x.s.joined: // it was quick
		return n, nil
	default:
		_, err := x.Wait()
		return 0, err
	}
}

// Confirm says how much of a lasting command's output has arrived where it was to go,
// in bytes since its start: the guest forgets it and may send more.
func (x *Session) Confirm(stdoutBytes, stderrBytes uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, n := range []uint64{stdoutBytes, stderrBytes} {
		if n <= x.confirmed[i] {
			continue
		}
		more := min(n-x.confirmed[i], window)
		x.confirmed[i] += more
		x.c.tell(x.id, kindCredit, uint8(stdout+i), binary.BigEndian.AppendUint32(nil, uint32(more)))
	}
}

// Release ends a lasting command that still runs, and has the guest forget one that
// has ended.
func (x *Session) Release() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	if x.c.session == x.s.session {
		x.c.out.send(frame{session: x.s.session, stream: x.id, kind: kindCancel})
	}
}

// Resize tells the command its terminal's new size.
func (x *Session) Resize(rows, cols uint16) {
	x.c.tell(x.id, kindControl, 0, encode(control{Rows: rows, Cols: cols}))
}

// Signal sends a signal, by its Linux number, to the command's process group.
func (x *Session) Signal(number int) {
	x.c.tell(x.id, kindControl, 0, encode(control{Signal: number}))
}

func (x *Session) copyOut(w io.Writer, channel uint8) {
	in := x.s.out[channel-stdout]
	buf := make([]byte, maxPayload)
	for {
		n, err := in.read(buf)
		if err != nil {
			return // the stream's answer says why
		}
		if w != nil {
			if _, err := w.Write(buf[:n]); err != nil {
				x.fail(err)
				w = nil // the rest is dropped, so that the command can end
			}
		}
		if c := in.used(n); c != nil && !x.s.lasting { // of a lasting one, Confirm tells
			x.c.tell(x.id, kindCredit, channel, c)
		}
	}
}

func (x *Session) fail(err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.writeErr == nil {
		x.writeErr = fmt.Errorf("write the command's output: %w", err)
	}
}

func (x *Session) copyIn(in io.Reader) {
	buf := make([]byte, maxPayload)
	for {
		n, err := in.Read(buf)
		for b := buf[:n]; len(b) > 0; {
			m, err := x.s.stdin.take(len(b))
			if err != nil {
				return
			}
			if x.send(b[:m]) != nil {
				return
			}
			b = b[m:]
		}
		if err != nil {
			if errors.Is(err, io.EOF) || !x.s.lasting { // that of a lasting one may go on elsewhere
				x.c.tell(x.id, kindEOF, stdin, nil)
			}
			return
		}
	}
}

// send writes stdin's data and waits until it is written.
func (x *Session) send(b []byte) error {
	x.c.mu.Lock()
	session, ok := x.c.session, x.c.streams[x.id] != nil
	x.c.mu.Unlock()
	if !ok {
		return ErrClosed
	}
	return x.c.out.data(frame{session: session, stream: x.id, kind: kindData, channel: stdin, payload: b})
}
