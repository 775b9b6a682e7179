package host

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"ingot/internal/agent"
	"ingot/internal/logfile"
	"ingot/internal/vm"
)

// Agent is the conversation with a running microVM's agent, once it is ready; not of a
// paused one. A daemon
// that has just started, or has lost it, is given until ctx ends to take it up again.
func (h *Host) Agent(ctx context.Context, uid string) (*agent.Client, error) {
	v, err := h.find(uid)
	if err != nil {
		return nil, err
	}
	views, stop := v.subscribe()
	defer stop()
	for {
		v.mu.Lock()
		client, status := v.agent, v.status
		v.mu.Unlock()
		if !status.AgentReady || status.Phase == vm.Paused { // it would answer some time
			return nil, fmt.Errorf("microvm is not ready (state: %s): %w", status.Phase, errdefs.ErrFailedPrecondition)
		}
		if client != nil {
			return client, nil
		}
		select {
		case _, there := <-views:
			if !there {
				return nil, fmt.Errorf("reach the guest's agent: the microVM was deleted: %w", errdefs.ErrNotFound)
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("reach the guest's agent: %w", ctx.Err())
		}
	}
}

// console is the serial console of a running microVM, shared by its viewers.
type console struct {
	conn io.ReadWriteCloser

	mu      sync.Mutex // guards what follows
	viewers map[*Viewer]bool
	recent  []byte // what a new viewer sees first
	closed  bool
}

// replay is how much of what the guest has written a new viewer sees.
const replay = 4 << 10

// Viewer is one view of a console. Read gives the last that the guest has
// written, and what it writes from now on; a viewer that reads too slowly loses
// the oldest.
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
	for range 2 { // the last viewer of the one that is there may just leave
		c, err := v.openConsole(ctx)
		if err != nil {
			return nil, err
		}
		if w := c.view(); w != nil {
			return w, nil
		}
	}
	return nil, fmt.Errorf("attach to console: the microVM has just ended: %w", errdefs.ErrFailedPrecondition)
}

// view adds a viewer; nil if the console is closed.
func (c *console) view() *Viewer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	w := &Viewer{console: c, output: make(chan []byte, 64), rest: bytes.Clone(c.recent)}
	c.viewers[w] = true
	return w
}

func (c *console) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// openConsole is the console that is open, or a new one.
func (v *instance) openConsole(ctx context.Context) (*console, error) {
	v.attaching.Lock()
	defer v.attaching.Unlock()
	v.mu.Lock()
	there, m, status := v.console, v.machine, v.status
	v.mu.Unlock()
	if there != nil && !there.isClosed() {
		return there, nil
	}
	if m == nil || status.PID == 0 {
		return nil, fmt.Errorf("attach to console: microvm is not ready (state: %s): %w", status.Phase, errdefs.ErrFailedPrecondition)
	}
	conn, err := m.Console(ctx)
	if err != nil {
		return nil, fmt.Errorf("attach to console: %w", err)
	}
	c := &console{conn: conn, viewers: map[*Viewer]bool{}}
	var log bytes.Buffer
	if err := logfile.Follow(ctx, filepath.Join(v.dir, status.Driver+".stdout"), replay, false, &log); err == nil {
		c.recent = log.Bytes()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.machine != m {
		c.close()
		return nil, fmt.Errorf("attach to console: the microVM has just ended: %w", errdefs.ErrFailedPrecondition)
	}
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
			c.recent = append(c.recent, data...)
			if extra := len(c.recent) - replay; extra > 0 {
				c.recent = append(c.recent[:0], c.recent[extra:]...)
			}
			for w := range c.viewers {
				select {
				case w.output <- data:
				default: // too slow: make room, unless it has just done so itself
					select {
					case <-w.output:
					default:
					}
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
