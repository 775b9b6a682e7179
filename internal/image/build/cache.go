package build

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// temporaries are what a build makes in the cache and removes at its end.
var temporaries = []string{".busybox-*", ".debian-*", ".ingot-*", "*/.download-*", "*/.ingot-*", "*/*/.ingot-*"}

// hold makes the cache and locks it, for as long as the file is open, against being
// cleared by another build. A build that has the cache for itself first clears it
// of what killed ones have left.
func (o Options) hold() (*os.File, error) {
	if err := os.MkdirAll(o.cache(), 0o755); err != nil {
		return nil, fmt.Errorf("make the cache: %w", err)
	}
	dir, err := os.Open(o.cache())
	if err != nil {
		return nil, fmt.Errorf("open the cache: %w", err)
	}
	alone := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	if alone {
		err = o.clear()
	}
	if err == nil {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_SH) // another clears it for a moment at most
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("clear the cache: %w", err)
	}
	return dir, nil
}

func (o Options) clear() error {
	for _, pattern := range temporaries {
		old, err := filepath.Glob(filepath.Join(o.cache(), pattern))
		if err != nil {
			return err
		}
		for _, path := range old {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}
