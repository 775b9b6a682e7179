package image

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// inRoot resolves the path of a regular file in an image's directory. The image
// may have been made by anyone: a link is followed as if root were /, so that
// neither links nor dots lead out of it. What is wrong with the path itself is
// ErrInvalidArgument.
func inRoot(root, path string) (string, error) {
	dir, err := os.Open(root)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), strings.TrimLeft(path, "/"), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	for _, wrong := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.EINVAL, unix.EXDEV} {
		if errors.Is(err, wrong) {
			return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil { // the path may be right: too many open files, or a disk's fault
		return "", err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("not a regular file: %w", errdefs.ErrInvalidArgument)
	}
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}
