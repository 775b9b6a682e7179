package qemu

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// machine is a QEMU that runs, or has run.
type machine struct {
	log  *slog.Logger
	dir  string
	r    record
	p    *process.Process
	done chan struct{}
	exit vmm.Exit // once done is closed

	watcher sync.WaitGroup
	closing sync.Once

	asking sync.Mutex // QEMU talks to one connection at a time

	mu      sync.Mutex
	stopped bool // by us
}

var _ vmm.Machine = (*machine)(nil)

func newMachine(log *slog.Logger, dir string, r record, p *process.Process) *machine {
	m := &machine{log: log, dir: dir, r: r, p: p, done: make(chan struct{})}
	m.watcher.Go(m.watch)
	return m
}

// watch waits for the end, without a thread, and puts it on record.
func (m *machine) watch() {
	status, child, err := m.p.Wait()
	if err != nil {
		return // let go of
	}
	m.exit = cause(m.dir, m.r, status, child)
	if m.claimed() {
		m.exit.Cause = vmm.Stopped
	}
	if err := finish(m.dir, m.r, m.exit); err != nil {
		m.log.Warn("cannot record the end of a microVM", "uid", m.r.UID, "err", err)
	}
	close(m.done)
}

// ask connects to QEMU's monitor for as long as a conversation takes: an idle
// microVM has no connection that costs a descriptor, a goroutine and its stack.
func (m *machine) ask(ctx context.Context, converse func(*monitor) error) error {
	m.asking.Lock()
	defer m.asking.Unlock()
	conn, err := dial(ctx, m.dir, m.r.Sockets["qmp"])
	if err != nil {
		return fmt.Errorf("connect to QEMU's monitor: %w", err)
	}
	q, err := newMonitor(ctx, conn)
	if err != nil {
		return err
	}
	defer q.close()
	return converse(q)
}

func (m *machine) tell(ctx context.Context, command string) error {
	return m.ask(ctx, func(q *monitor) error { return q.call(ctx, command, nil, nil) })
}

func (m *machine) PID() int              { return m.r.PID }
func (m *machine) Started() time.Time    { return m.r.StartedAt }
func (m *machine) Done() <-chan struct{} { return m.done }
func (m *machine) Exit() vmm.Exit        { return m.exit }

// State asks QEMU. One that has ended is dead.
func (m *machine) State(ctx context.Context) (vmm.State, error) {
	select {
	case <-m.done:
		return vmm.Dead, nil
	default:
	}
	var status struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	err := m.ask(ctx, func(q *monitor) error { return q.call(ctx, "query-status", nil, &status) })
	if err != nil {
		if m.gone() {
			return vmm.Dead, nil
		}
		return "", err
	}
	switch status.Status {
	case "running":
		return vmm.Running, nil
	case "shutdown", "guest-panicked", "internal-error":
		return vmm.Dead, nil
	default:
		return vmm.Paused, nil
	}
}

// gone says whether the process has ended, which is known before done is closed.
func (m *machine) gone() bool {
	_, err := process.StartTime(m.r.PID)
	return errdefs.IsNotFound(err)
}

func (m *machine) Pause(ctx context.Context) error  { return m.tell(ctx, "stop") }
func (m *machine) Resume(ctx context.Context) error { return m.tell(ctx, "cont") }

// Press presses the power button, which a paused guest does not feel.
func (m *machine) Press(ctx context.Context) error {
	m.claim()
	return m.ask(ctx, func(q *monitor) error {
		if err := q.call(ctx, "cont", nil, nil); err != nil {
			return err
		}
		return q.call(ctx, "system_powerdown", nil, nil)
	})
}

// Kill ends QEMU at once. What the guest has written to its disks is with the
// kernel already.
func (m *machine) Kill() error {
	m.claim()
	select {
	case <-m.done:
		return nil
	default:
	}
	if err := m.p.Signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	<-m.done
	return nil
}

// claim says that the end, if it is still to come, is our doing.
func (m *machine) claim() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
}

func (m *machine) claimed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stopped
}

// Console connects to the serial console.
func (m *machine) Console(ctx context.Context) (io.ReadWriteCloser, error) {
	return dial(ctx, m.dir, consoleSocket)
}

// Agent connects to the channel of the guest's agent.
func (m *machine) Agent(ctx context.Context) (net.Conn, error) {
	if m.r.Sockets["agent"] == "" {
		return nil, fmt.Errorf("connect to the agent: the microVM has no channel for one: %w", errdefs.ErrFailedPrecondition)
	}
	return dial(ctx, m.dir, agentSocket)
}

// Close lets go of QEMU without ending it.
func (m *machine) Close() error {
	m.closing.Do(func() {
		m.p.LetGo() // ends watch
		m.watcher.Wait()
		m.p.Close()
	})
	return nil
}
