package flintlock

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// machine is a hypervisor of flintlock's that runs, or has run.
type machine struct {
	d      *Driver
	dir    string
	socket string // of its API; empty: it has none
	p      *process.Process
	done   chan struct{}
	exit   vmm.Exit // once done is closed

	watcher sync.WaitGroup
	closing sync.Once

	mu      sync.Mutex
	stopped bool // by us
}

var _ vmm.Machine = (*machine)(nil)

func newMachine(d *Driver, dir, socket string, p *process.Process) *machine {
	m := &machine{d: d, dir: dir, socket: socket, p: p, done: make(chan struct{})}
	m.watcher.Go(m.watch)
	return m
}

// watch waits for the end. Its parent was flintlock, so nobody learns the status: what
// the hypervisor has said last is told instead.
func (m *machine) watch() {
	if _, _, err := m.p.Wait(); err != nil {
		return // let go of
	}
	detail := cmp.Or(lastLine(m.d.file(m.dir, "stderr")), lastLine(m.d.file(m.dir, "log")))
	m.exit = vmm.Exit{Cause: vmm.Unknown, Detail: detail, At: time.Now()}
	if m.claimed() {
		m.exit = vmm.Exit{Cause: vmm.Stopped, At: m.exit.At}
	}
	m.d.note(m.dir, m.exit)
	close(m.done)
}

func (m *machine) PID() int              { return m.p.PID }
func (m *machine) Started() time.Time    { return m.p.Started() }
func (m *machine) Done() <-chan struct{} { return m.done }
func (m *machine) Exit() vmm.Exit        { return m.exit }

// call asks Cloud Hypervisor's API.
func (m *machine) call(ctx context.Context, method, action string, result any) error {
	if m.socket == "" {
		return fmt.Errorf("%s: %s was started without an API: %w", action, m.d.name, errdefs.ErrNotImplemented)
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.socket)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost/api/v1/"+action, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("ask %s: %w", m.d.name, err)
	}
	defer response.Body.Close()
	const enough = 1 << 20
	body, err := io.ReadAll(io.LimitReader(response.Body, enough))
	if err != nil {
		return fmt.Errorf("ask %s: %s: %w", m.d.name, action, err)
	}
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("ask %s: %s: %s: %s", m.d.name, action, response.Status, bytes.TrimSpace(body))
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(body, result)
}

// State asks Cloud Hypervisor. Of Firecracker it is known only whether it is there.
func (m *machine) State(ctx context.Context) (vmm.State, error) {
	select {
	case <-m.done:
		return vmm.Dead, nil
	default:
	}
	if m.socket == "" {
		return vmm.Running, nil
	}
	var info struct {
		State string `json:"state"`
	}
	if err := m.call(ctx, http.MethodGet, "vm.info", &info); err != nil {
		return "", err
	}
	switch info.State {
	case "Running":
		return vmm.Running, nil
	case "Paused":
		return vmm.Paused, nil
	}
	return vmm.Dead, nil
}

// Press presses the power button. Firecracker has none, and no API here: it is asked
// to end itself, which its guest does not feel.
func (m *machine) Press(ctx context.Context) error {
	m.claim()
	if m.socket == "" {
		return m.p.Signal(unix.SIGTERM)
	}
	return m.call(ctx, http.MethodPut, "vm.power-button", nil)
}

// shutdownTime is how long Cloud Hypervisor has to let go of its disks.
const shutdownTime = 5 * time.Second

// Kill ends the hypervisor. Cloud Hypervisor is told before, so that its disks are
// closed; one that does not answer ends all the same.
func (m *machine) Kill() error {
	m.claim()
	select {
	case <-m.done:
		return nil
	default:
	}
	if m.socket != "" {
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
		defer cancel()
		if err := m.call(ctx, http.MethodPut, "vm.shutdown", nil); err != nil {
			m.d.log.Warn("shut Cloud Hypervisor's guest down", "uid", filepath.Base(m.dir), "err", err)
		}
	}
	if err := m.p.Signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill %s: %w", m.d.name, err)
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

// Console is none: flintlock has given the hypervisor no input. What the guest has
// written is in the log.
func (m *machine) Console(context.Context) (io.ReadWriteCloser, error) {
	return nil, fmt.Errorf("flintlock has started %s without a console: %w", m.d.name, errdefs.ErrNotImplemented)
}

// Agent is none: flintlock's guests have another one.
func (m *machine) Agent(context.Context) (net.Conn, error) {
	return nil, fmt.Errorf("flintlock's guests have no agent of Ingot's: %w", errdefs.ErrNotImplemented)
}

// Pause stops the guest's CPUs.
func (m *machine) Pause(ctx context.Context) error {
	return m.call(ctx, http.MethodPut, "vm.pause", nil)
}

// Resume continues them.
func (m *machine) Resume(ctx context.Context) error {
	return m.call(ctx, http.MethodPut, "vm.resume", nil)
}

// Grow is not offered: the volumes are flintlock's.
func (m *machine) Grow(context.Context, int, int64) error {
	return fmt.Errorf("flintlock has made the volumes: %w", errdefs.ErrNotImplemented)
}

// Metrics says what the hypervisor uses. Firecracker writes a metrics file itself,
// of which flintlock's tools read the last line, so nothing is added to that.
func (m *machine) Metrics(context.Context) (vmm.Metrics, error) {
	metrics := vmm.Metrics{At: time.Now()}
	var err error
	if metrics.CPU, err = m.p.CPUTime(); err == nil {
		metrics.Resident, err = m.p.Resident()
	}
	if err != nil {
		return metrics, fmt.Errorf("measure %s: %w", m.d.name, err)
	}
	if m.d.name == Firecracker {
		return metrics, nil
	}
	line, err := json.Marshal(metrics)
	if err != nil {
		return metrics, err
	}
	f, err := os.OpenFile(m.d.file(m.dir, "metrics"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return metrics, err
	}
	_, err = f.Write(append(line, '\n'))
	return metrics, errors.Join(err, f.Close())
}

// Close lets go of the hypervisor without ending it.
func (m *machine) Close() error {
	m.closing.Do(func() {
		m.p.LetGo()
		m.watcher.Wait()
		m.p.Close()
	})
	return nil
}
