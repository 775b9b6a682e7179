package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/containerd/errdefs"

	"ingot/internal/agent"
)

// Agent is the conversation with a running microVM's agent, once it is ready.
func (h *Host) Agent(uid string) (*agent.Client, error) {
	v, err := h.find(uid)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.agent == nil || !v.status.AgentReady {
		return nil, fmt.Errorf("microvm is not ready (state: %s): %w", v.status.Phase, errdefs.ErrFailedPrecondition)
	}
	return v.agent, nil
}

// console is the serial console of a running microVM, shared by its viewers.
type console struct {
	conn io.ReadWriteCloser

	mu      sync.Mutex // guards viewers
	viewers map[*Viewer]bool
	closed  bool
}

// Viewer is one view of a console. Read gives what the guest writes from now on;
// a viewer that reads too slowly loses the oldest.
type Viewer struct {
	console *console
	output  chan []byte
	rest    []byte
}

// Console attaches to a running microVM's serial console. Closing the last viewer
// lets go of it; the boot log has all of it either way.
func (h *Host) Console(ctx context.Context, uid string) (*Viewer, error) {
	v, err := h.find(uid)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	c := v.console
	v.mu.Unlock()
	if c == nil {
		if c, err = v.openConsole(ctx); err != nil {
			return nil, err
		}
	}
	w := &Viewer{console: c, output: make(chan []byte, 64)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("attach to console: the microVM has just ended: %w", errdefs.ErrFailedPrecondition)
	}
	c.viewers[w] = true
	return w, nil
}

func (v *instance) openConsole(ctx context.Context) (*console, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.console != nil {
		return v.console, nil
	}
	m := v.machine
	if m == nil || v.status.PID == 0 {
		return nil, fmt.Errorf("attach to console: microvm is not ready (state: %s): %w", v.status.Phase, errdefs.ErrFailedPrecondition)
	}
	conn, err := m.Console(ctx)
	if err != nil {
		return nil, fmt.Errorf("attach to console: %w", err)
	}
	c := &console{conn: conn, viewers: map[*Viewer]bool{}}
	v.console = c
	v.host.running.Go(func() {
		c.copy()
		v.mu.Lock()
		if v.console == c {
			v.console = nil
		}
		v.mu.Unlock()
	})
	return c, nil
}

// copy gives what the guest writes to all viewers.
func (c *console) copy() {
	buffer := make([]byte, 16<<10)
	for {
		n, err := c.conn.Read(buffer)
		if n > 0 {
			data := append([]byte(nil), buffer[:n]...)
			c.mu.Lock()
			for w := range c.viewers {
				select {
				case w.output <- data:
				default: // too slow: make room
					<-w.output
					w.output <- data
				}
			}
			c.mu.Unlock()
		}
		if err != nil {
			c.close()
			return
		}
	}
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	c.conn.Close()
	for w := range c.viewers {
		close(w.output)
	}
	c.viewers = map[*Viewer]bool{}
}

// Read returns what the guest writes; io.EOF when the microVM has ended.
func (w *Viewer) Read(p []byte) (int, error) {
	if len(w.rest) == 0 {
		data, ok := <-w.output
		if !ok {
			return 0, io.EOF
		}
		w.rest = data
	}
	n := copy(p, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// Write types into the console.
func (w *Viewer) Write(p []byte) (int, error) { return w.console.conn.Write(p) }

// Close ends the view.
func (w *Viewer) Close() error {
	c := w.console
	c.mu.Lock()
	there := c.viewers[w]
	if there {
		delete(c.viewers, w)
		close(w.output)
	}
	last := there && len(c.viewers) == 0
	c.mu.Unlock()
	if last {
		c.close()
	}
	return nil
}

// Follow copies a log to w, from offset on; with follow it goes on until ctx ends,
// and is told of each change by the kernel.
func Follow(ctx context.Context, path string, tail int64, follow bool, w io.Writer) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read log %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	if tail > 0 {
		if i, err := f.Stat(); err == nil && i.Size() > tail {
			if _, err := f.Seek(-tail, io.SeekEnd); err != nil {
				return fmt.Errorf("read log: %w", err)
			}
		}
	}
	if !follow {
		_, err := io.Copy(w, f)
		return err
	}
	changes, err := watchFile(path)
	if err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	defer changes.Close()
	stop := context.AfterFunc(ctx, func() { changes.Close() })
	defer stop()
	for events := make([]byte, 4096); ; {
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		if _, err := changes.Read(events); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow log: %w", err)
		}
	}
}
