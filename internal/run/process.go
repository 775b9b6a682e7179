package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process is a process of this machine, ours or one that an earlier process of
// ours has started. It is held by a pidfd (pidfd_open(2)), so that a signal never
// reaches another process that was given the same number later.
type Process struct {
	PID int

	fd   *os.File
	once sync.Once
}

// StartTime is when a process started, in clock ticks since the machine did
// (proc_pid_stat(5), field 22). With the pid it names a process for as long as
// the machine is up. A zombie has no start time: it is dead.
func StartTime(pid int) (uint64, error) {
	const state, start = 0, 19
	fields, err := stat(pid, start)
	if err != nil {
		return 0, err
	}
	if fields[state][0] == 'Z' || fields[state][0] == 'X' {
		return 0, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	return strconv.ParseUint(string(fields[start]), 10, 64)
}

// Stopped says whether a process stands still, by SIGSTOP or in a debugger.
func Stopped(pid int) bool {
	fields, err := stat(pid, 0)
	return err == nil && (fields[0][0] == 'T' || fields[0][0] == 't')
}

// stat are the fields of proc_pid_stat(5) from the third on, up to that of index
// last at least.
func stat(pid, last int) ([][]byte, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	// The name stands in parentheses and may contain anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= last {
		return nil, fmt.Errorf("read state of process %d: %d fields", pid, len(fields))
	}
	return fields, nil
}

// FindProcess opens a running process by its pid and start time (0: any). One
// that has ended, or whose number was given to another, is errdefs.ErrNotFound.
func FindProcess(pid int, start uint64) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &Process{PID: pid, fd: os.NewFile(uintptr(fd), "pidfd")}
	// Only now, with the process held, does its start time say which one it is.
	now, err := StartTime(pid)
	if err == nil && start != 0 && now != start {
		err = fmt.Errorf("process %d is another one now: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		p.fd.Close()
		return nil, err
	}
	return p, nil
}

// Wait returns when the process has ended, and reaps it if it is a child of
// ours. It waits on the network poller: no thread is held.
func (p *Process) Wait(ctx context.Context) error {
	if err := p.fd.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	stop := context.AfterFunc(ctx, func() { p.fd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	ended := false
	err = conn.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, _ := unix.Poll(poll, 0)
		ended = n > 0
		return ended
	})
	if !ended {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	p.reap()
	return nil
}

// reap takes a child's exit status. Other processes have another parent.
func (p *Process) reap() {
	p.once.Do(func() {
		var status unix.WaitStatus
		for {
			_, err := unix.Wait4(p.PID, &status, unix.WNOHANG, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
}

// Signal sends a signal. A process that has ended is no error.
func (p *Process) Signal(sig unix.Signal) error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	// Fd would switch the file to blocking mode.
	if control := conn.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); control != nil {
		err = control
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// Stop asks the process to end, insists when ctx does, and waits for its end.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	if p.Wait(ctx) == nil {
		return nil
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	return p.Wait(context.WithoutCancel(ctx))
}

// Close lets go of the process without ending it.
func (p *Process) Close() error { return p.fd.Close() }
