package pool

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// CanShare says why files in dir cannot share blocks, so that Open would make an
// image there; nil if they can. It tries, with files that have no name, so that
// none is left behind; an old overlay has no such files.
func CanShare(dir string) error {
	src, err := nameless(dir)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return canClone(dir)
	}
	if err != nil {
		return fmt.Errorf("share blocks: %w", err)
	}
	defer src.Close()
	dst, err := nameless(dir)
	if err != nil {
		return fmt.Errorf("share blocks: %w", err)
	}
	defer dst.Close()
	if _, err := src.Write(make([]byte, 4096)); err != nil {
		return fmt.Errorf("share blocks: %w", err)
	}
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err != nil {
		return fmt.Errorf("share blocks in %s: %w", dir, err)
	}
	return nil
}

func nameless(dir string) (*os.File, error) { return os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600) }
