package pool

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests in a mount namespace of their own, so that no mount
// and no loop device outlives them however they end.
func TestMain(m *testing.M) {
	if os.Getenv("POOL_TEST_INSIDE") != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), "POOL_TEST_INSIDE=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := again.Run(); err != nil && again.ProcessState == nil {
		os.Exit(1)
	}
	os.Exit(again.ProcessState.ExitCode())
}

func open(t *testing.T, dir string) *Pool {
	t.Helper()
	p, err := Open(t.Context(), dir, Options{Size: 500})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(p.Path(), unix.MNT_DETACH) })
	return p
}

// tmpfs is a file system that surely cannot share blocks.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestOpenMakesAnImage(t *testing.T) {
	needs(t, "mkfs.xfs")
	dir := tmpfs(t, "4g")
	p := open(t, dir)
	file := filepath.Join(p.Path(), "kept")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if n := mounts(t, p.Path()); n != 1 {
		t.Errorf("opened twice, mounted %d times", n)
	}
	f, err := p.Facts()
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != "xfs" || f.Image == "" || f.Size < 400<<20 || f.Used <= 0 || f.Available <= 0 || f.Available > f.Backing {
		t.Errorf("facts: %+v", f)
	}
	// A crash: the mount is gone, the image is not.
	if err := unix.Unmount(p.Path(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Facts(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("facts of an unmounted pool: %v", err)
	}
	open(t, dir)
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if n := loops(t, filepath.Join(dir, "pool.xfs")); n != 1 {
		t.Errorf("%d loop devices", n)
	}
}

// TestTwoMounts: the image is mounted in another mount namespace too. Both must
// be the same file system.
func TestTwoMounts(t *testing.T) {
	needs(t, "mkfs.xfs")
	dir := tmpfs(t, "4g")
	p := open(t, dir)
	other := t.TempDir()
	if err := ensureMounted(filepath.Join(dir, "pool.xfs"), other); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(p.Path(), "seen"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(other, "seen")); err != nil {
		t.Error(err)
	}
	if n := loops(t, filepath.Join(dir, "pool.xfs")); n != 1 {
		t.Errorf("%d loop devices", n)
	}
}

func TestDirectoryThatCanShareNeedsNoImage(t *testing.T) {
	needs(t, "mkfs.xfs")
	outer := open(t, tmpfs(t, "4g"))
	inner := open(t, filepath.Join(outer.Path(), "inner"))
	f, err := inner.Facts()
	if err != nil || f.Image != "" || f.Type != "xfs" {
		t.Errorf("facts: %+v, %v", f, err)
	}
	left, err := os.ReadDir(inner.Path())
	if err != nil || len(left) != 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
}

func TestNoRoom(t *testing.T) {
	needs(t, "mkfs.xfs")
	dir := tmpfs(t, "1g")
	_, err := Open(t.Context(), dir, Options{})
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("a pool on a small file system: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "pool.xfs*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	// Less than was asked for, but enough: what is there beside the reserve.
	p, err := Open(t.Context(), dir, Options{Reserve: 100})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(p.Path(), unix.MNT_DETACH) })
	info, err := os.Stat(filepath.Join(dir, "pool.xfs"))
	if err != nil || info.Size() < 900<<20 || info.Size() > 924<<20 {
		t.Errorf("image: %d, %v", info.Size(), err)
	}
}

func TestTool(t *testing.T) {
	needs(t, "mkfs.xfs")
	if _, err := Tool("mkfs.nosuch", "nosuchprogs"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "apt-get install nosuchprogs") {
		t.Errorf("got %v", err)
	}
	t.Setenv("PATH", "/nonexistent")
	if _, err := Tool("mkfs.xfs", "xfsprogs"); err != nil {
		t.Errorf("with a user's PATH: %v", err)
	}
}

// TestMissingMkfs hides the program.
func TestMissingMkfs(t *testing.T) {
	needs(t, "mkfs.xfs")
	dir := tmpfs(t, "4g")
	program, err := Tool("mkfs.xfs", "xfsprogs")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{program, "/usr/sbin/mkfs.xfs"} {
		if unix.Mount("/dev/null", path, "", unix.MS_BIND, "") == nil {
			t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
		}
	}
	_, err = Open(t.Context(), dir, Options{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "apt-get install xfsprogs") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "pool.xfs")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an image is there: %v", err)
	}
}

func mounts(t *testing.T, dir string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), " "+dir+" ")
}

func loops(t *testing.T, image string) int {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(data)) == "/pool.xfs" || strings.TrimSpace(string(data)) == image {
			n++
		}
	}
	return n
}
