package pool

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Clone makes the new file dst share all blocks of src. It does not wait for
// the disk: after a power failure dst may be missing, but once anything in dst
// was synced it is there as a whole, since XFS and btrfs log both in order.
// The file is open for reading and writing, and is the caller's to close.
func Clone(dst, src string) (_ *os.File, err error) {
	from, err := os.Open(src)
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("clone %s: %w", src, err)
	}
	if err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd())); err != nil {
		to.Close()
		os.Remove(dst)
		return nil, fmt.Errorf("clone %s to %s: %w", src, dst, err)
	}
	return to, nil
}

// canClone tries to clone a file in dir. Only the file system's answer counts:
// XFS may have been made without reflink, and overlays differ.
func canClone(dir string) error {
	src, err := os.CreateTemp(dir, ".clone-*")
	if err != nil {
		return err
	}
	defer os.Remove(src.Name())
	defer src.Close()
	if _, err := src.Write(make([]byte, 4096)); err != nil {
		return err
	}
	copied := src.Name() + ".copy"
	dst, err := Clone(copied, src.Name())
	if err != nil {
		return err
	}
	defer os.Remove(copied)
	return dst.Close()
}
