package pool

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"ingot/internal/need"
	"ingot/internal/vm"
)

// A file system that a killed guest has left grows too, with its journal
// replayed before: else that would undo the growing at the next mount.
func TestGrowUnclean(t *testing.T) {
	need.Root(t)
	for _, program := range []string{"mkfs.ext4", "debugfs", "e2fsck", "resize2fs"} {
		need.Binary(t, program)
	}
	path := filepath.Join(t.TempDir(), "volume")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
	run("mkfs.ext4", "-q", path, "16M")
	run("debugfs", "-w", "-R", "feature needs_recovery", path)
	for range 2 { // the second time there is nothing to do
		if err := Grow(t.Context(), path, 64); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if size, err := Ext4Size(f); err != nil || size != vm.MiB(64).Bytes() {
		t.Errorf("the file system has %d bytes, %v", size, err)
	}
	if ok, err := clean(f); err != nil || !ok {
		t.Errorf("clean: %t, %v", ok, err)
	}
	run("e2fsck", "-fn", path)
	if err := Grow(t.Context(), path, 32); err != nil {
		t.Error(err)
	}
	if info, err := f.Stat(); err != nil || info.Size() != vm.MiB(64).Bytes() {
		t.Errorf("it shrank to %d, %v", info.Size(), err)
	}
}

// What a guest has put in the place of ext4 keeps nobody from starting it again.
func TestGrowOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "volume")
	content := bytes.Repeat([]byte("other"), 1<<20)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Grow(t.Context(), path, 16); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || int64(len(got)) != vm.MiB(16).Bytes() || !bytes.Equal(got[:len(content)], content) {
		t.Errorf("%d bytes are there: %v", len(got), err)
	}
}

func TestExtend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "volume")
	if _, err := Extend(path, 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a volume that is not there: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ size, want vm.MiB }{{0, 0}, {64, 64}, {64, 64}, {32, 64}} {
		bytes, err := Extend(path, c.size)
		if err != nil || bytes != c.want.Bytes() {
			t.Errorf("to %d MiB: %d bytes, %v", c.size, bytes, err)
		}
		if info, err := os.Stat(path); err != nil || info.Size() != bytes || info.Sys().(*syscall.Stat_t).Blocks > 16 {
			t.Errorf("to %d MiB: the file has %+v, %v", c.size, info, err)
		}
	}
}
