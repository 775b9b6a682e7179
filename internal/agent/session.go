package agent

import (
	"context"
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

	mu       sync.Mutex
	writeErr error // the first of Stdout and Stderr
}

// Exec starts a command in the guest. Its input is in, which may be nil; a Read
// from it that is in progress when the command ends is the caller's to end. With
// a TTY all output is out's. Either writer may be nil. A writer that stands still
// stops this command only. When ctx ends, the command is killed.
func (c *Client) Exec(ctx context.Context, cmd Command, in io.Reader, out, errOut io.Writer) (*Session, error) {
	if len(cmd.Args) == 0 && !cmd.Main {
		return nil, errors.New("run in the guest: no command")
	}
	id, s, err := c.open(ctx, request{Op: "exec", Command: &cmd, Stdin: in != nil})
	if err != nil {
		return nil, fmt.Errorf("run in the guest: %w", err)
	}
	x := &Session{c: c, id: id, s: s, done: make(chan struct{})}
	x.outputs.Go(func() { x.copyOut(out, stdout) })
	x.outputs.Go(func() { x.copyOut(errOut, stderr) })
	if in != nil {
		go x.copyIn(in) // ends with in, or at its first Read after the command's end
	}
	stop := context.AfterFunc(ctx, func() {
		c.tell(id, kindCancel, 0, nil)
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
		if c := in.used(n); c != nil {
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
			x.c.tell(x.id, kindEOF, stdin, nil)
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
