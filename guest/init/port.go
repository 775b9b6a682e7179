package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ingot/internal/agent"
)

// port is the virtio-serial port to the host. While no host is connected a read
// gives nothing and a write would block; the poller wakes at each change, so
// nothing here polls by the clock.
type port struct {
	file     *os.File
	raw      syscall.RawConn
	attached bool // a host was there at the last read
}

// openPort waits for the agent's port and opens it.
func openPort(ctx context.Context) (*port, error) {
	var file *os.File
	var err error
	waitErr := awaitDevice(ctx, func() bool {
		device := findPort()
		if device == "" {
			return false
		}
		file, err = os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK, 0)
		return !errors.Is(err, os.ErrNotExist) // the name is there a moment before the node
	})
	if waitErr != nil {
		return nil, waitErr
	}
	if err != nil {
		return nil, err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &port{file: file, raw: raw}, nil
}

func findPort() string {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return ""
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.TrimSpace(string(b)) == agent.Port {
			return "/dev/" + filepath.Base(filepath.Dir(n))
		}
	}
	return ""
}

// Read waits for a host and its bytes. It returns agent.ErrDetached once when a
// host has gone.
func (p *port) Read(b []byte) (n int, err error) {
	waitErr := p.raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), b)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				p.attached = true
				return false
			case err != nil:
				return true
			case n > 0:
				p.attached = true
				return true
			case p.attached:
				p.attached = false
				err = agent.ErrDetached
				return true
			default:
				return false
			}
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return max(n, 0), err
}

func (p *port) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		var n int
		var err error
		waitErr := p.raw.Write(func(fd uintptr) bool {
			for {
				n, err = unix.Write(int(fd), b[done:])
				if !errors.Is(err, unix.EINTR) {
					return !errors.Is(err, unix.EAGAIN)
				}
			}
		})
		if err := errors.Join(waitErr, err); err != nil {
			return done, err
		}
		if n <= 0 {
			return done, io.ErrShortWrite
		}
		done += n
	}
	return done, nil
}
