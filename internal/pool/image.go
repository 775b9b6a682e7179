package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vm"
)

// makeImage makes a sparse file with an empty XFS in it. It appears under its
// name only when it is complete. It is made and never copied: two copies have
// one UUID and do not mount beside each other.
func makeImage(ctx context.Context, path string, o Options) error {
	mkfs, err := Tool("mkfs.xfs", "xfsprogs")
	if err != nil {
		return fmt.Errorf("make %s, since the file system cannot share blocks between files: %w", path, err)
	}
	size, err := imageSize(filepath.Dir(path), o)
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	part := path + ".part"
	defer os.Remove(part)
	if err := allocate(part, size.Bytes()); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	// -K: the file is all holes, there is nothing to discard.
	if out, err := exec.CommandContext(ctx, mkfs, "-q", "-K", "-m", "reflink=1", part).CombinedOutput(); err != nil {
		return fmt.Errorf("make %s: mkfs.xfs: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	if err := errors.Join(syncFile(part), os.Rename(part, path)); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

// imageSize is what the options ask for, or what the file system can hold
// beside the reserve: guests that write must not find it full beneath them.
func imageSize(dir string, o Options) (vm.MiB, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, err
	}
	want, reserve := o.Size, o.Reserve
	if want == 0 {
		want = DefaultSize
	}
	if reserve == 0 {
		reserve = DefaultReserve
	}
	room := vm.MiB(int64(s.Bavail)*s.Bsize>>20) - reserve
	if room < MinSize {
		return 0, fmt.Errorf("%d MiB are free, need %d MiB and a reserve of %d MiB: %w",
			room+reserve, MinSize, reserve, errdefs.ErrResourceExhausted)
	}
	return max(min(want, room), MinSize), nil
}

func allocate(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
