package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"ingot/internal/pool"
)

const (
	// enoughDisk is what a new environment takes: the images, what they are built
	// from, and room for microVMs to write.
	enoughDisk = 3 << 30
	// leastDisk is what an environment that is there needs to go on.
	leastDisk    = 256 << 20
	enoughInodes = 20000
)

// existing is dir, or what there is of the path to it.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func lookDisk(_ context.Context, p Patient) Finding {
	dir := existing(p.Dir)
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return unseen(fmt.Errorf("%s: %w", dir, err))
	}
	const breaks = "images and microVMs' disks do not fit"
	free := int64(s.Bavail) * s.Bsize
	detail := fmt.Sprintf("%d MiB are free in %s", free>>20, dir)
	if s.Flags&unix.ST_RDONLY != 0 {
		return fail(dir+" is read-only", "nothing can be kept", "mount -o remount,rw its file system, or mount another on "+p.Dir)
	}
	if s.Files > 0 && s.Ffree < enoughInodes {
		return p.lack(fmt.Sprintf("only %d more files fit into %s", s.Ffree, dir), breaks, "delete small files (du --inodes -x / | sort -n), or mount another file system on "+p.Dir, s.Ffree < enoughInodes/10)
	}
	if free >= enoughDisk {
		return pass(detail)
	}
	return p.lack(fmt.Sprintf("only %s: %d are needed", detail, enoughDisk>>20), breaks,
		"delete what is not needed (du -x / | sort -n), or mount another file system on "+p.Dir, free < leastDisk)
}

// lack is what stops a new environment, and one that is there only if much is lacking.
func (p Patient) lack(detail, breaks, fix string, much bool) Finding {
	if p.Exists && !much {
		return warn(detail, breaks, fix)
	}
	return fail(detail, breaks, fix)
}

func lookReflink(_ context.Context, p Patient) Finding {
	dir := existing(p.Dir)
	err := pool.CanShare(dir)
	if err == nil {
		return pass("files in " + dir + " can share blocks")
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EROFS):
		return skip("cannot be tried: see disk")
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return skip("only root can try in " + dir)
	case !hasFilesystem("xfs"):
		return fail("files in "+dir+" cannot share blocks, and the kernel has no XFS", "each microVM's disk is a copy of its image that shares its blocks",
			"modprobe xfs, or mount an XFS or btrfs on "+p.Dir).
			mendedBy(func(ctx context.Context) error { return modprobe(ctx, "xfs") })
	}
	return pass("files in " + dir + " cannot share blocks: each host gets an XFS in a sparse file")
}

const loopControl = "/dev/loop-control"

// lookLoop looks for the loop devices that hosts' XFS images are mounted by.
func lookLoop(_ context.Context, p Patient) Finding {
	const breaks = "a host's disks live in an XFS image, which is mounted by a loop device"
	dir := existing(p.Dir)
	switch {
	case os.Geteuid() != 0:
		return skip("only root can try")
	case pool.CanShare(dir) == nil:
		return pass("not needed: files in " + dir + " can share blocks")
	}
	if len(p.Machines) > 0 {
		return pass("the hosts have theirs")
	}
	free, err := loops()
	if err != nil {
		return unseen(err)
	}
	want := max(1, p.Hosts)
	if _, err := os.Stat(loopControl); err != nil {
		return fail(loopControl+" is missing", breaks, "modprobe loop; mknod "+loopControl+" c 10 237").
			mendedBy(func(ctx context.Context) error { return makeLoops(ctx, want) })
	}
	if free < want {
		return fail(fmt.Sprintf("%d loop devices are free: %d are needed", free, want), breaks,
			"losetup -a shows who has them; mknod /dev/loopN b 7 N makes more").
			mendedBy(func(ctx context.Context) error { return makeLoops(ctx, want) })
	}
	return pass(fmt.Sprintf("%d are free", free))
}

// loops counts the devices that nothing is attached to. The kernel makes more when
// asked for a free one; that counts where the device's node appears by itself.
func loops() (int, error) {
	devices, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		return 0, err
	}
	free := 0
	for _, d := range devices {
		_, missing := os.Stat("/dev/" + filepath.Base(d))
		if missing == nil && read(filepath.Join(d, "loop/backing_file")) == "" {
			free++
		}
	}
	if isDevtmpfs() {
		free = max(free, 64)
	}
	return free, nil
}

// isDevtmpfs says whether the kernel itself makes the nodes in /dev.
func isDevtmpfs() bool {
	var s unix.Stat_t
	if unix.Stat("/dev", &s) != nil {
		return false
	}
	device := fmt.Sprintf("%d:%d", unix.Major(s.Dev), unix.Minor(s.Dev))
	for line := range strings.Lines(read("/proc/self/mountinfo")) {
		before, after, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(before); len(fields) > 2 && fields[2] == device {
			return strings.HasPrefix(after, "devtmpfs ")
		}
	}
	return false
}

// makeLoops makes the nodes of enough free loop devices.
func makeLoops(ctx context.Context, want int) error {
	loaded := modprobe(ctx, "loop")
	if err := makeNode(loopControl, unix.S_IFCHR, 10, 237); err != nil {
		return errors.Join(err, loaded)
	}
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, loaded)
	}
	defer control.Close()
	for n := range 1 << 10 {
		sys := fmt.Sprintf("/sys/block/loop%d", n)
		if read(sys+"/loop/backing_file") != "" {
			continue
		}
		if _, err := os.Stat(sys); err != nil {
			if err := unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_ADD, n); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("make loop device %d: %w", n, err)
			}
		}
		if err := makeNode(fmt.Sprintf("/dev/loop%d", n), unix.S_IFBLK, 7, uint32(n)); err != nil {
			return err
		}
		if want--; want <= 0 {
			return nil
		}
	}
	return errors.New("all loop devices are in use")
}

func makeNode(path string, kind, major, minor uint32) error {
	err := unix.Mknod(path, kind|0o660, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}
