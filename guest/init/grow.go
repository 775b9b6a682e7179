package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// disk is a virtio disk, whole: a partition stays as large as its table says.
type disk struct {
	name   string // vda
	number string // major:minor
	size   int64
}

// mountPoint is where a file system is to be seen.
type mountPoint struct{ number, path, kind string }

// followDisks has the file systems on the disks grow with them, until ctx ends. What
// happened before this was called is caught up.
func followDisks(ctx context.Context) {
	err := watchDevices(ctx, func(event []byte) bool {
		name := resized(event)
		switch {
		case len(event) == 0:
			for _, d := range findDisks("vd*") {
				d.follow(false)
			}
		case strings.HasPrefix(name, "vd"):
			for _, d := range findDisks(name) {
				say("%s has %s now", d.name, mebibytes(d.size))
				d.follow(true)
			}
		}
		return false
	})
	if ctx.Err() == nil {
		report(err)
	}
}

// resized is the name of the disk that an event says has another size, or empty.
func resized(event []byte) (name string) {
	grown := false
	for field := range bytes.SplitSeq(event, []byte{0}) {
		if value, ok := bytes.CutPrefix(field, []byte("DEVNAME=")); ok {
			name = filepath.Base(string(value))
		}
		grown = grown || string(field) == "RESIZE=1"
	}
	if !grown {
		return ""
	}
	return name
}

func findDisks(pattern string) (disks []disk) {
	dirs, err := filepath.Glob("/sys/block/" + pattern)
	if err != nil {
		return nil
	}
	for _, dir := range dirs {
		number, err := os.ReadFile(dir + "/dev")
		if err != nil {
			continue
		}
		text, err := os.ReadFile(dir + "/size")
		if err != nil {
			continue
		}
		const sector = 512 // whatever the disk's own are
		sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err == nil {
			disks = append(disks, disk{filepath.Base(dir), strings.TrimSpace(string(number)), sectors * sector})
		}
	}
	return disks
}

// follow has the file system on a disk fill it. grown says that the disk has just
// grown: then it is told why one does not.
func (d disk) follow(grown bool) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		say("%v", err)
		return
	}
	mounts := parseMounts(string(table))
	mounts = slices.DeleteFunc(mounts, func(m mountPoint) bool { return m.number != d.number })
	switch {
	case len(mounts) == 0:
		if grown {
			say("no file system on %s is mounted: one that is ext4 follows at the microVM's next start", d.name)
		}
	case mounts[0].kind != "ext4":
		if grown {
			say("%s on %s is %s: to grow it is up to you", mounts[0].path, d.name, mounts[0].kind)
		}
	default:
		if err := d.growExt4(mounts); err != nil {
			say("grow the file system on %s: %v", d.name, err)
		}
	}
}

// growExt4 grows a file system by any of the places where it is mounted: some may be
// read-only, or have something else mounted above.
func (d disk) growExt4(mounts []mountPoint) error {
	blocks, size, err := ext4Blocks("/dev/" + d.name)
	if err != nil {
		return err
	}
	want := uint64(d.size / size)
	if want <= blocks {
		return nil
	}
	for _, m := range mounts {
		if err = m.resizeExt4(want); err == nil {
			say("%s has %s now, it had %s", m.path, mebibytes(d.size), mebibytes(int64(blocks)*size))
			return nil
		}
	}
	return err
}

func (m mountPoint) resizeExt4(blocks uint64) error {
	f, err := os.Open(m.path)
	if err != nil {
		return err
	}
	defer f.Close()
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return err
	}
	if fmt.Sprintf("%d:%d", unix.Major(s.Dev), unix.Minor(s.Dev)) != m.number {
		return fmt.Errorf("something else is mounted on %s", m.path)
	}
	const resizeFS = 0x40086610 // EXT4_IOC_RESIZE_FS, of ext4's own numbers
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return fmt.Errorf("ext4 at %s: %w", m.path, errno)
	}
	return nil
}

// ext4Blocks reads from its superblock how many blocks a file system has, and of
// what size.
func ext4Blocks(device string) (blocks uint64, size int64, err error) {
	f, err := os.Open(device)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return 0, 0, err
	}
	le := binary.LittleEndian
	if le.Uint16(sb[0x38:]) != 0xef53 {
		return 0, 0, errors.New("there is no superblock of ext4")
	}
	blocks = uint64(le.Uint32(sb[0x4:]))
	const incompat64bit = 0x80
	if le.Uint32(sb[0x60:])&incompat64bit != 0 {
		blocks |= uint64(le.Uint32(sb[0x150:])) << 32
	}
	return blocks, 1024 << le.Uint32(sb[0x18:]), nil
}

// parseMounts reads the form of /proc/self/mountinfo.
func parseMounts(table string) (mounts []mountPoint) {
	for line := range strings.Lines(table) {
		before, after, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) >= 5 && len(kind) > 0 {
			mounts = append(mounts, mountPoint{fields[2], escapes.Replace(fields[4]), kind[0]})
		}
	}
	return mounts
}

// escapes are how the kernel writes what would end a path.
var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func mebibytes(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }
