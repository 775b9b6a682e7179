package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// FileLock is an exclusive lock that ends with Release, or with the process.
type FileLock struct{ f *os.File }

// Lock waits until this process alone has the lock of that file, and calls
// waiting once, if not nil, when another has it.
func Lock(ctx context.Context, path string, waiting func()) (*FileLock, error) {
	look := time.NewTicker(50 * time.Millisecond) // flock(2) can't be waited for with a context
	defer look.Stop()
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue // the directory was removed in between
		}
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return &FileLock{f}, nil
		}
		f.Close()
		switch {
		case err == nil:
			continue // its last owner has removed it in between
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock %s: %w", path, context.Cause(ctx))
		}
	}
}

// isAt says whether an open file is the one at that path: a lock of a file that
// was removed keeps nobody out.
func isAt(f *os.File, path string) bool {
	own, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(own, there)
}

// Release gives the lock back and removes its file.
func (l *FileLock) Release() error {
	return errors.Join(removeFile(l.f.Name()), l.f.Close())
}
