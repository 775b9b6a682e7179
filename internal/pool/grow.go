package pool

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// Grow makes a volume's file and the ext4 in it at least as large as size. It
// never shrinks: a smaller size is a lower bound that is already met. A volume
// that has its size is not touched, so that one in use is safe.
func Grow(ctx context.Context, path string, size vm.MiB) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < size.Bytes() {
		if err := f.Truncate(size.Bytes()); err != nil {
			return err
		}
	}
	has, err := Ext4Size(f)
	if err != nil || has >= size.Bytes() {
		return err
	}
	resize, err := Tool("resize2fs", "e2fsprogs")
	if err != nil {
		return err
	}
	// -f: the file system is as the image's last layer left it, never mounted by a guest.
	if out, err := exec.CommandContext(ctx, resize, "-f", path).CombinedOutput(); err != nil {
		return fmt.Errorf("resize2fs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Ext4Size reads the size of the file system from its superblock.
func Ext4Size(f *os.File) (int64, error) {
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return 0, fmt.Errorf("read superblock: %w", err)
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return 0, fmt.Errorf("read superblock: not an ext4 file system: %w", errdefs.ErrFailedPrecondition)
	}
	blocks := uint64(binary.LittleEndian.Uint32(sb[0x4:]))
	const incompat64bit = 0x80
	if binary.LittleEndian.Uint32(sb[0x60:])&incompat64bit != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(sb[0x150:])) << 32
	}
	return int64(blocks << (10 + binary.LittleEndian.Uint32(sb[0x18:]))), nil
}
