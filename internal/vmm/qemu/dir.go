package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The files of a microVM, in its state directory. They belong to the user that
// the host runs as: QEMU gets them open.
const (
	cfgFile     = "qemu.cfg"     // the command line, a word a line
	pidFile     = "qemu.pid"     // decimal
	logFile     = "qemu.log"     // what the driver did and why
	stdoutFile  = "qemu.stdout"  // the serial console; appended to
	stderrFile  = "qemu.stderr"  // QEMU's own complaints, of this run
	metricsFile = "qemu.metrics" // a JSON object a line
	eventsFile  = "qemu.events"  // QEMU's own events, of this run: a JSON object a line
	recordFile  = "runtime.json" // what Attach needs

	qmpSocket     = "qmp.sock"
	consoleSocket = "console.sock"
	agentSocket   = "agent.sock"
)

// directory is a state directory, held open: a socket in it is named by way of
// /proc/self/fd, since its own path may be too long for a socket's address.
type directory struct {
	path string
	fd   int
}

// farFD is where the numbers of these descriptors begin. QEMU tries to unlink
// its sockets by the name they were bound with. It has no such descriptor, and
// says nothing about a file that does not exist.
const farFD = 600

func openDirectory(path string) (*directory, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	far, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, farFD)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &directory{path: path, fd: far}, nil
}

func (d *directory) Close() error { return unix.Close(d.fd) }

func (d *directory) address(name string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.fd, name)}
}

// listen binds a socket that only its owner may connect to.
func (d *directory) listen(name string) (*os.File, error) {
	if err := os.Remove(filepath.Join(d.path, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", d.address(name))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(d.path, name), err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(filepath.Join(d.path, name), 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

func dial(ctx context.Context, dir, name string) (net.Conn, error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", d.address(name).Name)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), err)
	}
	return conn, nil
}

// replaceFile writes a file whole or not at all. It does not sync: what is
// recorded here is of processes, which do not survive the machine either.
func replaceFile(dir, name string, data []byte) error {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// tail reads the end of a file, from offset `from` at the earliest.
func tail(path string, from, size int64) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	if end < from { // what was before has been moved away
		from = 0
	}
	text := make([]byte, min(size, end-from))
	n, _ := f.ReadAt(text, end-int64(len(text)))
	return text[:n]
}
