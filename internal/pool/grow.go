package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// Grow makes a volume's file and the ext4 in it at least as large as size, while
// nobody has it mounted. It never shrinks: a smaller size is a lower bound that is
// already met. A volume that has its size is not touched, so that one in use is
// safe. What is no ext4 is its guest's own to grow.
func Grow(ctx context.Context, path string, size vm.MiB) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := extend(f, size); err != nil {
		return err
	}
	has, err := Ext4Size(f)
	if errdefs.IsFailedPrecondition(err) {
		return nil
	}
	if err != nil || has >= size.Bytes() {
		return err
	}
	if os.Geteuid() == 0 {
		// What a guest has written is read by programs that have had bugs: they can
		// reach nothing but this file.
		if err := f.Chown(nobody, nobody); err != nil {
			return err
		}
		defer f.Chown(0, 0)
	}
	ok, err := clean(f)
	if err != nil {
		return err
	}
	if !ok { // a guest that was not shut down left a journal, which resize2fs does not replay
		if err := repair(ctx, f, 2, "e2fsck", "-fp"); err != nil {
			return err
		}
	}
	return repair(ctx, f, 0, "resize2fs", "-f") // -f: when it was last checked does not matter
}

// Extend makes a volume's file at least as large as size, and returns how large it
// is then. The file system in it stays as it is, so that it may be in use.
func Extend(path string, size vm.MiB) (bytes int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return extend(f, size)
}

func extend(f *os.File, size vm.MiB) (bytes int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() >= size.Bytes() {
		return info.Size(), nil
	}
	if err := f.Truncate(size.Bytes()); err != nil { // sparse: it takes no room yet
		return 0, err
	}
	// What a guest writes into the new part is worth nothing without the size.
	return size.Bytes(), f.Sync()
}

const nobody = 65534

// repair runs a program of e2fsprogs on f, of which an exit code up to most is good.
func repair(ctx context.Context, f *os.File, most int, name string, args ...string) error {
	program, err := Tool(name, "e2fsprogs")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, append(args, "/proc/self/fd/3")...)
	cmd.ExtraFiles = []*os.File{f}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 && exit.ExitCode() <= most {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// clean says whether a file system was unmounted, and has no errors.
func clean(f *os.File) (bool, error) {
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return false, fmt.Errorf("read superblock: %w", err)
	}
	const valid, incompatRecover = 1, 4
	return binary.LittleEndian.Uint16(sb[0x3a:]) == valid && binary.LittleEndian.Uint32(sb[0x60:])&incompatRecover == 0, nil
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
