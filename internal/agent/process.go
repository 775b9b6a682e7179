package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"unsafe"
)

// Reaper starts processes and waits for them, and for every other child of
// this process: the init of a guest has children that it did not start. While
// one runs, nothing else in the process may wait for children (os/exec does).
type Reaper struct {
	mu       sync.Mutex // held from fork to registration, so that no exit is missed
	children map[int]*Process
	waiting  []chan struct{} // closed when there are no children
	signals  chan os.Signal
	loop     sync.WaitGroup
}

// Process is a child.
type Process struct {
	PID  int
	done chan struct{}
	code int
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Code is its exit code, or 128 plus the signal that ended it, once it is Done.
func (p *Process) Code() int { return p.code }

// NewReaper starts waiting.
func NewReaper() *Reaper {
	r := &Reaper{children: map[int]*Process{}, signals: make(chan os.Signal, 1)}
	signal.Notify(r.signals, syscall.SIGCHLD)
	r.loop.Go(func() {
		for range r.signals {
			r.reap()
		}
	})
	return r
}

// Close stops waiting; children go on.
func (r *Reaper) Close() {
	signal.Stop(r.signals)
	close(r.signals)
	r.loop.Wait()
}

// Wait waits until this process has no children, or ctx ends.
func (r *Reaper) Wait(ctx context.Context) error {
	none := make(chan struct{})
	r.mu.Lock()
	r.waiting = append(r.waiting, none)
	r.mu.Unlock()
	r.reap()
	select {
	case <-none:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if errors.Is(err, syscall.ECHILD) {
			for _, w := range r.waiting {
				close(w)
			}
			r.waiting = nil
			return
		}
		if err != nil || pid <= 0 {
			return
		}
		p := r.children[pid]
		if p == nil {
			continue
		}
		delete(r.children, pid)
		p.code = status.ExitStatus()
		if status.Signaled() {
			p.code = 128 + int(status.Signal())
		}
		close(p.done)
	}
}

// Start runs cmd in a session of its own. Files are its standard input, output
// and error; with a TTY the first becomes its controlling terminal.
func (r *Reaper) Start(cmd Command, files [3]*os.File) (*Process, error) {
	if len(cmd.Args) == 0 {
		return nil, &Error{Code: 126, Text: "no command"}
	}
	u, err := lookup(cmd.User)
	if err != nil {
		return nil, err
	}
	env := u.environment(cmd)
	path, err := search(cmd.Args[0], env["PATH"], cmd.Dir)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{
		Dir:   cmd.Dir,
		Files: []uintptr{files[0].Fd(), files[1].Fd(), files[2].Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: cmd.TTY, Credential: u.credential()},
	}
	if attr.Dir == "" {
		attr.Dir = "/"
	}
	for k, v := range env {
		attr.Env = append(attr.Env, k+"="+v)
	}
	u.own(files)
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, cmd.Args, attr)
	if err != nil {
		var wrong *os.PathError
		if _, bad := os.Stat(attr.Dir); errors.As(bad, &wrong) { // ForkExec does not say which of the two it means
			path, err = "in "+attr.Dir, wrong.Err
		}
		return nil, &Error{Code: 126, Text: fmt.Sprintf("start %s: %v", path, err)}
	}
	p := &Process{PID: pid, done: make(chan struct{})}
	r.children[pid] = p
	return p, nil
}

// search finds the program as a shell would.
func search(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if err := executable(resolve(dir, name)); err != nil {
			return "", startError(name, err)
		}
		return name, nil
	}
	for _, d := range filepath.SplitList(path) {
		if full := filepath.Join(resolve(dir, d), name); executable(full) == nil {
			return full, nil
		}
	}
	return "", startError(name, os.ErrNotExist)
}

func resolve(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join("/", dir, name)
}

func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() || info.Mode()&0o111 == 0 {
		return os.ErrPermission
	}
	return nil
}

func startError(name string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return &Error{Code: 127, Text: name + ": not found in the guest"}
	}
	return &Error{Code: 126, Text: name + ": not executable"}
}

// openTerminal opens a new pseudo-terminal.
func openTerminal(rows, cols uint16) (master, slave *os.File, err error) {
	fd, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx") // non-blocking: Read can be given a deadline
	var locked, number int32
	if err := ioctl(fd, syscall.TIOCSPTLCK, unsafe.Pointer(&locked)); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("unlock the pseudo-terminal: %w", err), master.Close())
	}
	if err := ioctl(fd, syscall.TIOCGPTN, unsafe.Pointer(&number)); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("number the pseudo-terminal: %w", err), master.Close())
	}
	resize(fd, rows, cols)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

func resize(fd int, rows, cols uint16) {
	if rows == 0 || cols == 0 {
		return
	}
	size := [4]uint16{rows, cols}
	ioctl(fd, syscall.TIOCSWINSZ, unsafe.Pointer(&size)) // fails only once the terminal has gone
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
