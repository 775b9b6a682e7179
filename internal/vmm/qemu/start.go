package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// launch is a start in progress: what is open, and what was made.
type launch struct {
	d     *Driver
	c     vmm.Config
	dir   *directory
	old   map[string]bool // files that were there before
	files []*os.File      // what the process gets, by its number there
	close []*os.File      // what this process closes again
	h     handover
	r     record
}

// Start boots a microVM. It returns when QEMU has made the machine and takes
// commands; the guest runs from then on.
func (d *Driver) Start(ctx context.Context, c vmm.Config) (_ vmm.Machine, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start QEMU: %w", err)
		}
	}()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	binary, err := exec.LookPath(d.Binary)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	if err := vacant(c.Dir); err != nil {
		return nil, err
	}
	l := &launch{d: d, c: c}
	defer l.release()
	m, err := l.run(ctx, binary)
	if err != nil {
		l.undo()
		return nil, err
	}
	return m, nil
}

// vacant makes sure that nothing runs in dir.
func vacant(dir string) error {
	r, err := readRecord(dir)
	if errdefs.IsNotFound(err) {
		sweep(dir, "")
		return nil
	}
	if err != nil {
		return err
	}
	p, err := r.find()
	if errdefs.IsNotFound(err) {
		sweep(dir, "")
		return nil
	}
	if err != nil {
		return err
	}
	p.Close()
	return fmt.Errorf("process %d runs in %s: %w", r.PID, dir, errdefs.ErrAlreadyExists)
}

func (l *launch) run(ctx context.Context, binary string) (vmm.Machine, error) {
	if err := l.open(); err != nil {
		return nil, err
	}
	argv := append([]string{binary}, l.d.argv(l.c, l.h)...)
	cfg := strings.Join(argv, "\n") + "\n"
	if err := replaceFile(l.c.Dir, cfgFile, []byte(cfg)); err != nil {
		return nil, err
	}
	// The socket listens already, so the connection waits there for QEMU: no
	// polling for a socket to appear.
	conn, err := dial(ctx, l.c.Dir, qmpSocket)
	if err != nil {
		return nil, err
	}
	// From here until the new record is written, a process of this directory is
	// known by its command line only: an old record would hide it.
	if err := os.Remove(filepath.Join(l.c.Dir, recordFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		conn.Close()
		return nil, err
	}
	p, err := l.spawn(binary, argv)
	if err != nil {
		conn.Close()
		return nil, err
	}
	l.release() // so that the sockets close with the process
	if err := l.meet(ctx, p, conn); err != nil {
		p.Signal(unix.SIGKILL)
		p.Wait()
		p.Close()
		if line := lastLine(filepath.Join(l.c.Dir, stderrFile), ""); line != "" && ctx.Err() == nil {
			err = errors.New(line)
		}
		return nil, err
	}
	return newMachine(l.d.Log, l.c.Dir, l.r, p), nil
}

// meet records the new process, then waits until it answers.
func (l *launch) meet(ctx context.Context, p *process.Process, conn net.Conn) error {
	version, _ := l.d.askVersion()
	l.r = record{
		Format: recordFormat, Driver: Name, Version: version, Accelerator: l.d.accelerator(),
		UID: l.c.UID, PID: p.PID, StartTime: p.Start, BootID: bootID(), StartedAt: time.Now(), ConsoleFrom: l.r.ConsoleFrom,
		Sockets: map[string]string{"qmp": qmpSocket, "console": consoleSocket},
	}
	if l.c.Agent {
		l.r.Sockets["agent"] = agentSocket
	}
	err := l.r.write(l.c.Dir)
	if err == nil {
		err = replaceFile(l.c.Dir, pidFile, []byte(strconv.Itoa(p.PID)+"\n"))
	}
	if err != nil {
		conn.Close()
		return err
	}
	if l.c.Spawned != nil {
		l.c.Spawned(p.PID)
	}
	note(l.c.Dir, "started: process %d, version %s, %s %s", p.PID, version, l.r.Accelerator, l.d.KVM.Reason())
	q, err := newMonitor(ctx, conn)
	if err != nil {
		return err
	}
	return q.close()
}

// spawn makes the process, of its own session and user.
func (l *launch) spawn(binary string, argv []string) (*process.Process, error) {
	attr := &syscall.SysProcAttr{Setsid: true}
	if l.c.User != 0 {
		attr.Credential = &syscall.Credential{Uid: uint32(l.c.User), Gid: uint32(l.c.User), Groups: l.d.groups()}
	}
	child, err := os.StartProcess(binary, argv, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/bin:/bin"}, Files: l.files, Sys: attr,
	})
	if err != nil {
		return nil, err
	}
	defer child.Release()
	p, err := hold(child)
	if errdefs.IsNotFound(err) { // it has ended already
		err = errors.New(lastLine(filepath.Join(l.c.Dir, stderrFile), err.Error()))
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// hold opens a child, and leaves none that it can't open.
func hold(child *os.Process) (*process.Process, error) {
	p, err := process.Find(child.Pid, 0)
	if err != nil {
		child.Kill()
		child.Wait()
	}
	return p, err
}

// groups is what QEMU's user needs to open /dev/kvm: the group that owns it.
func (d *Driver) groups() []uint32 {
	var s unix.Stat_t
	if !d.KVM.Usable || unix.Stat("/dev/kvm", &s) != nil {
		return nil
	}
	return []uint32{s.Gid}
}

// release closes what the process has of its own now.
func (l *launch) release() {
	for _, f := range l.close {
		f.Close()
	}
	l.close = nil
	if l.dir != nil {
		l.dir.Close()
		l.dir = nil
	}
}

// undo removes the files that this start has made.
func (l *launch) undo() {
	for _, name := range []string{cfgFile, logFile, stdoutFile, stderrFile, metricsFile, eventsFile} {
		if !l.old[name] {
			removeAll(l.c.Dir, name)
		}
	}
	removeAll(l.c.Dir, recordFile, pidFile, qmpSocket, consoleSocket, agentSocket)
}
