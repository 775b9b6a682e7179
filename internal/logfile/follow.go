// Package logfile reads and bounds log files that other processes append to,
// among them hypervisors, which cannot be asked to open another one. It owns
// the second file that a full one is moved to, FILE.1, and writes nothing else.
package logfile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Follow copies a log to w: its last tail bytes, or all that is kept of it if
// tail is 0. With follow it goes on until ctx ends, and is told of each change by
// the kernel. A log that is not there is errdefs.ErrNotFound.
func Follow(ctx context.Context, path string, tail int64, follow bool, w io.Writer) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read log %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	from := int64(0)
	if tail > 0 {
		from = max(0, size-tail)
	}
	if tail == 0 || tail > size {
		if err := copyOld(path+old, tail-size, w); err != nil {
			return err
		}
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	if !follow {
		_, err := io.Copy(w, f)
		return err
	}
	return followOpen(ctx, f, w)
}

// copyOld copies the end of what was moved away, all of it if tail is not positive.
func copyOld(path string, tail int64, w io.Writer) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("read log: %w", err)
	} else if tail <= 0 {
		tail = size
	} else {
		tail = min(tail, size)
	}
	if _, err := f.Seek(-tail, io.SeekEnd); err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	_, err = io.Copy(w, f)
	return err
}

func followOpen(ctx context.Context, f *os.File, w io.Writer) error {
	changes, err := watch(f.Name())
	if err != nil {
		return fmt.Errorf("follow log: %w", err)
	}
	defer changes.Close()
	stop := context.AfterFunc(ctx, func() { changes.Close() })
	defer stop()
	for events := make([]byte, 4096); ; {
		if err := rewind(f); err != nil {
			return fmt.Errorf("follow log: %w", err)
		}
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		if _, err := changes.Read(events); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow log: %w", err)
		}
	}
}

// rewind goes to the beginning of a file that was emptied.
func rewind(f *os.File) error {
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() < at {
		_, err = f.Seek(0, io.SeekStart)
	}
	return err
}

// watch opens an inotify(7) instance that has something to read whenever the
// file changes. It waits on the network poller.
func watch(path string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY|unix.IN_DELETE_SELF); err != nil {
		f.Close()
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	return f, nil
}
