package image

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

// grow makes a volume as large as was asked for. It never shrinks: a size below
// the pool's is a lower bound that is already met. A volume that has its size
// is not touched, so that one in use is safe.
func grow(ctx context.Context, path string, v vm.Volume) error {
	if v.Size == 0 || v.ReadOnly {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("grow volume %s: %w", v.ID, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("grow volume %s: %w", v.ID, err)
	}
	if info.Size() < v.Size.Bytes() {
		if err := f.Truncate(v.Size.Bytes()); err != nil {
			return fmt.Errorf("grow volume %s: %w", v.ID, err)
		}
	}
	has, err := ext4Size(f)
	if err != nil {
		return fmt.Errorf("grow volume %s: %w", v.ID, err)
	}
	if has >= v.Size.Bytes() {
		return nil
	}
	resize, err := pool.Tool("resize2fs", "e2fsprogs")
	if err != nil {
		return fmt.Errorf("grow volume %s: %w", v.ID, err)
	}
	// -f: the file system is as the image's last layer left it, never mounted by a guest.
	if out, err := exec.CommandContext(ctx, resize, "-f", path).CombinedOutput(); err != nil {
		return fmt.Errorf("grow volume %s: %w: %s", v.ID, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ext4Size reads the size of the file system from its superblock.
func ext4Size(f *os.File) (int64, error) {
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
