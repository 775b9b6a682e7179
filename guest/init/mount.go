package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// newRoot is where the root file system is mounted before it becomes /.
const newRoot = "/root"

const quietMount = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountFirst mounts what the kernel's interfaces need.
func mountFirst() error {
	return errors.Join(
		mountAt("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"),
		mountAt("proc", "/proc", "proc", quietMount, ""),
		mountAt("sysfs", "/sys", "sysfs", quietMount, ""),
	)
}

func mountAt(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// deviceWait is how long a root device may take to appear: virtio devices are
// there at once.
const deviceWait = 5 * time.Second

// mountRoot mounts the root file system at newRoot.
func mountRoot(ctx context.Context, o options) error {
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	device := ""
	if err := awaitDevice(ctx, func() bool { device = findDevice(o.root); return device != "" }); err != nil {
		return fmt.Errorf("mount the root file system: no device %s after %v: is there a disk, and virtio_blk in the kernel or the initramfs?", o.root, deviceWait)
	}
	if err := mountDevice(device, newRoot, o.rootType, o.rootFlags, o.readOnly); err != nil {
		return fmt.Errorf("mount the root file system: %w", err)
	}
	return nil
}

// findDevice is the node of a root= word, or empty while there is none.
func findDevice(root string) string {
	if strings.HasPrefix(root, "/dev/") {
		if _, err := os.Stat(root); err != nil {
			return ""
		}
		return root
	}
	id, ok := strings.CutPrefix(root, "PARTUUID=")
	if !ok {
		return ""
	}
	return findPartition(id)
}

// mountDevice mounts a block device whose file system is kind, or, if kind is
// empty, the first that the kernel knows and that takes it.
func mountDevice(device, target, kind, data string, readOnly bool) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	var flags uintptr
	if readOnly {
		flags = unix.MS_RDONLY
	}
	kinds := []string{kind}
	if kind == "" {
		kinds = fileSystems()
	}
	var last error
	for _, k := range kinds {
		err := unix.Mount(device, target, k, flags, data)
		if err == nil {
			return nil
		}
		if last == nil || !errors.Is(err, unix.EINVAL) {
			last = fmt.Errorf("mount %s as %s: %w", device, k, err)
		}
	}
	if last == nil {
		last = fmt.Errorf("mount %s: the kernel knows no file system", device)
	}
	return last
}

// fileSystems are those that need a device, ext4 first: ext2 and ext3 would
// take an ext4 that needs no repair, or complain.
func fileSystems() []string {
	kinds := []string{"ext4"}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return kinds
	}
	for line := range strings.Lines(string(b)) {
		kind, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "\t")
		if ok && !strings.HasPrefix(kind, "ext") && kind != "fuseblk" {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// switchRoot makes newRoot the root of this process and of all after it. /dev,
// /proc and /sys move with it, and /run is a fresh tmpfs. A root without these
// directories, and read-only, goes without.
func switchRoot() error {
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := os.MkdirAll(newRoot+d, 0o755); err != nil {
			return fmt.Errorf("prepare the root file system: %w", err)
		}
		if err := unix.Mount(d, newRoot+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root file system: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the root file system: %w", err)
	}
	return os.Chdir("/")
}

// mountRun mounts /run under root. An image may have a link to elsewhere there.
func mountRun(root string) error {
	return mountAt("tmpfs", filepath.Join(root, "run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=20%")
}

// mountRest mounts what an init would have, in the new root, and the volumes
// that have a place. What fails is said: the guest is of use without it.
func mountRest(volumes []mount) {
	report(mountAt("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5"))
	report(mountAt("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"))
	report(mountRun("/"))
	report(mountAt("cgroup2", "/sys/fs/cgroup", "cgroup2", quietMount, ""))
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}} {
		if err := os.Symlink(l[0], "/dev/"+l[1]); err != nil && !os.IsExist(err) {
			say("%v", err)
		}
	}
	for _, v := range volumes {
		report(mountDevice(v.device, v.path, "", "", v.readOnly))
	}
}
