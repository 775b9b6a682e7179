package pool

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ensureMounted mounts the image on dir, unless it is already.
func ensureMounted(image, dir string) error {
	mounted, err := isMounted(dir)
	if err != nil || mounted {
		return err
	}
	// The image may be mounted in another mount namespace. A second loop device
	// over the same file would be a second file system on the same blocks; a
	// second mount of the same device is the same file system.
	device, err := findLoop(image)
	if err != nil {
		return err
	}
	if device == nil {
		if device, err = attachLoop(image); err != nil {
			return err
		}
	}
	// The device detaches itself when both this descriptor and the mount are gone.
	defer device.Close()
	// discard gives freed blocks back to the file system beneath.
	if err := unix.Mount(device.Name(), dir, "xfs", unix.MS_NOATIME|unix.MS_NOSUID|unix.MS_NODEV, "discard"); err != nil {
		return fmt.Errorf("mount %s on %s: %w", image, dir, err)
	}
	return nil
}

func isMounted(dir string) (bool, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// Field 5 is the mount point, with blanks as octal.
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.ReplaceAll(fields[4], `\040`, " ") == dir {
			return true, nil
		}
	}
	return false, lines.Err()
}

// findLoop opens the loop device that image is attached to; nil if there is none.
func findLoop(image string) (*os.File, error) {
	var want unix.Stat_t
	if err := unix.Stat(image, &want); err != nil {
		return nil, err
	}
	devices, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		name := "/dev/" + strings.Split(d, "/")[3]
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			continue // detached since the listing
		}
		info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
		if err == nil && info.Inode == want.Ino && info.Device == want.Dev {
			return f, nil
		}
		f.Close()
	}
	return nil, nil
}

// attachLoop attaches image to a free loop device that detaches itself with its
// last user, so that a crash leaves none behind.
func attachLoop(image string) (*os.File, error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", image, err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("attach %s: find a free loop device: %w", image, err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", image, err)
		}
		err = configureLoop(device, f)
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) { // EBUSY: another process took it between the two calls
			return nil, fmt.Errorf("attach %s to %s: %w", image, device.Name(), err)
		}
	}
}

// configureLoop asks for direct I/O, so that pages are cached once and not
// twice, and does without where the file system beneath has none.
func configureLoop(device, image *os.File) error {
	c := unix.LoopConfig{Fd: uint32(image.Fd())}
	copy(c.Info.File_name[:len(c.Info.File_name)-1], image.Name())
	c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	err := unix.IoctlLoopConfigure(int(device.Fd()), &c)
	if errors.Is(err, unix.EINVAL) {
		c.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(device.Fd()), &c)
	}
	return err
}
