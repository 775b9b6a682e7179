package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// process is held by a pidfd: signals go to it and to no other that was given
// its number later, and its end is heard on the netpoller, without a thread.
type process struct {
	pid   int
	start uint64 // clock ticks since the machine's start, as in /proc/PID/stat
	fd    *os.File
}

// findProcess opens a process that runs. One that does not, a zombie, and
// another one of the same number are errdefs.ErrNotFound. A start of 0 is any.
func findProcess(pid int, start uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd")}
	// Only now that it is held, its start time says who it is.
	p.start, err = startTime(pid)
	if err == nil && start != 0 && p.start != start {
		err = fmt.Errorf("process %d is another one: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		p.fd.Close()
		return nil, err
	}
	return p, nil
}

// startTime reads when a process started (proc(5), field 22).
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold spaces and parentheses itself.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	if state := fields[0][0]; state == 'Z' || state == 'X' {
		return 0, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// wait returns when the process has ended, with its status if it was a child of
// ours. It fails if the process is let go of meanwhile.
func (p *process) wait() (status unix.WaitStatus, child bool, err error) {
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
		got, err := unix.Wait4(p.pid, &status, unix.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return status, err == nil && got == p.pid, nil
		}
	}
}

// signal sends a signal; a process that has ended is no error.
func (p *process) signal(sig unix.Signal) error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	if sent != nil && !errors.Is(sent, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.pid, sent)
	}
	return nil
}

func (p *process) close() error { return p.fd.Close() }
