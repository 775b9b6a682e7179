package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
)

// open opens all that the process will need, and makes the files.
func (l *launch) open() (err error) {
	if l.dir, err = openDirectory(l.c.Dir); err != nil {
		return err
	}
	l.old = map[string]bool{}
	for _, name := range []string{cfgFile, logFile, stdoutFile, stderrFile, metricsFile, eventsFile} {
		_, err := os.Lstat(filepath.Join(l.c.Dir, name))
		l.old[name] = !errors.Is(err, fs.ErrNotExist)
	}
	l.h.consoleSet, l.h.diskSetOne = 1, 2
	for _, step := range []func() error{l.openStandard, l.openKernel, l.openSockets, l.openDevices} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// pass gives a file to the process and says which number it has there.
func (l *launch) pass(f *os.File) int {
	l.files = append(l.files, f)
	return len(l.files) - 1
}

// own is pass for a file that this process closes again.
func (l *launch) own(f *os.File) int {
	l.close = append(l.close, f)
	return l.pass(f)
}

// openStandard prepares 0, 1, 2 and the logs. QEMU's second monitor is on 0 and
// 1: it reads one command, from a pipe whose other end QEMU holds itself, so that
// it never ends, and writes events to a file.
func (l *launch) openStandard() error {
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	l.own(in)
	l.close = append(l.close, out)
	if _, err := out.WriteString(`{"execute":"qmp_capabilities"}` + "\n"); err != nil {
		return err
	}
	for _, name := range []string{eventsFile, stderrFile} {
		f, err := l.create(name, os.O_APPEND|os.O_TRUNC)
		if err != nil {
			return err
		}
		l.own(f)
	}
	l.pass(out)
	console, err := l.create(stdoutFile, os.O_APPEND)
	if err != nil {
		return err
	}
	l.h.console = l.own(console)
	info, err := console.Stat()
	if err != nil {
		return err
	}
	l.r.ConsoleFrom = info.Size()
	metrics, err := l.create(metricsFile, os.O_APPEND)
	if err != nil {
		return err
	}
	return metrics.Close()
}

func (l *launch) create(name string, flag int) (*os.File, error) {
	return os.OpenFile(filepath.Join(l.c.Dir, name), os.O_CREATE|os.O_WRONLY|flag, 0o600)
}

// openKernel opens kernel and initrd. QEMU opens them again by
// /proc/self/fd/N, as its own user: the directories above need not be its to
// enter, but the files must be its to read.
func (l *launch) openKernel() error {
	kernel, err := os.Open(l.c.Kernel)
	if err != nil {
		return fmt.Errorf("open kernel: %w", err)
	}
	l.h.kernel = l.own(kernel)
	if l.c.Initrd == "" {
		return nil
	}
	initrd, err := os.Open(l.c.Initrd)
	if err != nil {
		return fmt.Errorf("open initrd: %w", err)
	}
	l.h.initrd = l.own(initrd)
	return nil
}

func (l *launch) openSockets() error {
	for _, s := range []struct {
		name string
		fd   *int
		skip bool
	}{{qmpSocket, &l.h.qmp, false}, {consoleSocket, &l.h.serial, false}, {agentSocket, &l.h.agent, !l.c.Agent}} {
		if s.skip {
			continue
		}
		f, err := l.dir.listen(s.name)
		if err != nil {
			return err
		}
		*s.fd = l.own(f)
	}
	return nil
}

// openDevices takes over the disks and taps of the caller, who keeps them open.
func (l *launch) openDevices() error {
	for _, disk := range l.c.Disks {
		if err := usable(disk.File); err != nil {
			return fmt.Errorf("disk %s: %w", disk.ID, err)
		}
		block, err := isBlock(disk.File)
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk.ID, err)
		}
		file, err := l.diskFile(disk)
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk.ID, err)
		}
		l.h.disks = append(l.h.disks, file)
		l.h.blockDisks = append(l.h.blockDisks, block)
	}
	for _, nic := range l.c.NICs {
		if err := usable(nic.File); err != nil {
			return fmt.Errorf("network card %s: %w", nic.ID, err)
		}
		if len(nic.MAC) != 6 {
			return fmt.Errorf("network card %s: MAC address %q: %w", nic.ID, nic.MAC, errdefs.ErrInvalidArgument)
		}
		l.h.nics = append(l.h.nics, l.pass(nic.File))
	}
	return nil
}

// diskFile passes a disk on. QEMU takes one that is only read as such only if
// its file is open for nothing else.
func (l *launch) diskFile(disk vmm.Disk) (int, error) {
	if !disk.ReadOnly {
		return l.pass(disk.File), nil
	}
	f, err := os.Open(fdPath(int(disk.File.Fd())))
	if err != nil {
		return 0, err
	}
	return l.own(f), nil
}

// usable says whether a file is open.
func usable(f *os.File) error {
	if f == nil {
		return fmt.Errorf("no file: %w", errdefs.ErrInvalidArgument)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var status error
	if err := conn.Control(func(fd uintptr) { _, status = unix.FcntlInt(fd, unix.F_GETFL, 0) }); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return status
}
