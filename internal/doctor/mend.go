package doctor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ingot/internal/pool"
)

// do runs a program that changes something, and says what it said if it fails.
func do(ctx context.Context, program string, args ...string) error {
	c := exec.CommandContext(ctx, program, args...)
	c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	out, err := c.CombinedOutput()
	if err == nil {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, lines[len(lines)-1])
}

func modprobe(ctx context.Context, module string) error {
	path, err := pool.Tool("modprobe", "kmod")
	if err != nil {
		return err
	}
	return do(ctx, path, module)
}

// read is a small file of the kernel's, empty if there is none.
func read(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

// number is one that the kernel shows in a file, or -1.
func number(path string) int64 {
	n, err := strconv.ParseInt(read(path), 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// raise makes a setting of the kernel at least so large, until the next reboot.
func raise(path string, least int64) error {
	if number(path) >= least {
		return nil
	}
	return os.WriteFile(path, []byte(strconv.FormatInt(least, 10)), 0)
}

// hasFilesystem says whether the kernel has a kind of file system, or can load it.
func hasFilesystem(kind string) bool {
	for line := range strings.Lines(read("/proc/filesystems")) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[len(fields)-1] == kind {
			return true
		}
	}
	return hasModule(kind)
}

func hasModule(name string) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		if strings.Contains(read(filepath.Join(dir, list)), "/"+name+".ko") {
			return true
		}
	}
	return false
}
