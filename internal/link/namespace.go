package link

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a machine's network, mount and UTS namespace, pinned in a
// directory by bind mounts, so that it outlives every process in it.
type Namespace struct {
	Dir string
	net *os.File
}

var kinds = []string{"net", "mnt", "uts"}

// OpenNamespace opens what PinNamespace pinned in dir.
func OpenNamespace(dir string) (*Namespace, error) {
	f, err := os.Open(filepath.Join(dir, "net"))
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil || s.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("open namespace: %s is not pinned", dir)
	}
	return &Namespace{Dir: dir, net: f}, nil
}

// PinNamespace pins the namespaces of a process in dir. The file system of dir
// must be mounted privately: the kernel refuses to bind a mount namespace
// where the bind would propagate.
func PinNamespace(pid int, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pin namespaces: %w", err)
	}
	for _, kind := range kinds {
		pin := filepath.Join(dir, kind)
		f, err := os.OpenFile(pin, os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			return fmt.Errorf("pin namespaces: %w", err)
		}
		f.Close()
		if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), pin, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin %s namespace in %s: %w", kind, dir, err)
		}
	}
	return nil
}

// UnpinNamespace lets go of what is pinned in dir, and removes dir. What is not
// there is no error.
func UnpinNamespace(dir string) error {
	for _, kind := range kinds {
		pin := filepath.Join(dir, kind)
		for unix.Unmount(pin, unix.MNT_DETACH) == nil {
			// A pin may have been made twice, if its maker was killed in between.
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("unpin namespaces: %w", err)
	}
	return nil
}

// Close lets go of the namespace without ending it.
func (n *Namespace) Close() error { return n.net.Close() }

// Inode identifies the network namespace, as /proc/PID/ns/net shows it.
func (n *Namespace) Inode() (uint64, error) {
	var s unix.Stat_t
	if err := unix.Fstat(int(n.net.Fd()), &s); err != nil {
		return 0, fmt.Errorf("identify namespace: %w", err)
	}
	return s.Ino, nil
}

// Do calls f on a thread that is in the network namespace. What f starts on
// other threads is not.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Start starts a command inside all three namespaces.
func (n *Namespace) Start(c *exec.Cmd) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := n.Enter(); err != nil {
			done <- err
			return
		}
		done <- c.Start()
	}()
	return <-done
}

// Enter puts the calling thread, which the caller has locked, into all three
// namespaces, for an exec that follows. There is no way back.
func (n *Namespace) Enter() error {
	// A thread that shares its file system state with others can't change its
	// mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter namespaces: unshare: %w", err)
	}
	var fds []int
	for _, kind := range kinds {
		fd, err := unix.Open(filepath.Join(n.Dir, kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("enter %s namespace: %w", kind, err)
		}
		fds = append(fds, fd)
	}
	for i, fd := range fds {
		if err := unix.Setns(fd, 0); err != nil {
			return fmt.Errorf("enter %s namespace: %w", kinds[i], err)
		}
		unix.Close(fd)
	}
	return nil
}
