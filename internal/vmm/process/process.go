// Package process holds processes that may outlive the one that started them:
// hypervisors. It owns the descriptors that it holds them by, starts none, and does
// not know what they are for.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process is held by a pidfd: signals go to it and to no other that was given
// its number later, and its end is heard on the netpoller, without a thread.
type Process struct {
	PID   int
	Start uint64 // clock ticks since the machine's start, as in /proc/PID/stat
	fd    *os.File
}

// Find opens a process that runs. One that does not, a zombie, and another one of
// the same number are errdefs.ErrNotFound. A start of 0 is any.
func Find(pid int, start uint64) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &Process{PID: pid, fd: os.NewFile(uintptr(fd), "pidfd")}
	// Only now that it is held, its start time says who it is.
	p.Start, err = StartTime(pid)
	if err == nil && start != 0 && p.Start != start {
		err = fmt.Errorf("process %d is another one: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		p.fd.Close()
		return nil, err
	}
	return p, nil
}

// StartTime reads when a process that runs was started (proc(5), field 22).
func StartTime(pid int) (uint64, error) {
	fields, err := stat(pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	if state := fields[0]; state == "Z" || state == "X" {
		return 0, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// stat reads /proc/PID/stat from the third field on. The name before it, in
// parentheses, may hold spaces and parentheses itself.
func stat(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	return fields, nil
}

// Cmdline reads a process's words.
func Cmdline(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00"), nil
}

// List returns the numbers of all processes.
func List() ([]int, error) {
	files, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []int
	for _, f := range files {
		if pid, err := strconv.Atoi(f.Name()); err == nil {
			all = append(all, pid)
		}
	}
	return all, nil
}

// Started is when the process was started.
func (p *Process) Started() time.Time {
	text, err := os.ReadFile("/proc/stat")
	_, rest, _ := strings.Cut(string(text), "\nbtime ")
	boot, _, _ := strings.Cut(rest, "\n")
	seconds, bad := strconv.ParseInt(boot, 10, 64)
	if err != nil || bad != nil {
		return time.Time{}
	}
	return time.Unix(seconds, 0).Add(ticks(int64(p.Start)))
}

// ticks is a time that the kernel tells in USER_HZ, which is 100 wherever Go runs.
func ticks(n int64) time.Duration { return time.Duration(n) * time.Second / 100 }

// CPUTime is how long the process has run, in user and kernel mode.
func (p *Process) CPUTime() (time.Duration, error) {
	fields, err := stat(p.PID)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return ticks(sum), nil
}

// Resident is how much memory the process holds.
func (p *Process) Resident() (int64, error) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.PID))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return 0, fmt.Errorf("read /proc/%d/statm: %d fields", p.PID, len(fields))
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// Wait returns when the process has ended, with its status if it was a child of
// ours. It fails if the process is let go of meanwhile.
func (p *Process) Wait() (status unix.WaitStatus, child bool, err error) {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if err != nil {
		return 0, false, err
	}
	// It stays ours until it is reaped, so its number is still its own.
	for {
		got, err := unix.Wait4(p.PID, &status, unix.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return status, err == nil && got == p.PID, nil
		}
	}
}

// LetGo ends Wait without the process's end.
func (p *Process) LetGo() { p.fd.SetReadDeadline(time.Unix(1, 0)) }

// Signal sends a signal; a process that has ended is no error.
func (p *Process) Signal(sig unix.Signal) error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	if sent != nil && !errors.Is(sent, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, sent)
	}
	return nil
}

// Close lets go of the process's descriptor.
func (p *Process) Close() error { return p.fd.Close() }
