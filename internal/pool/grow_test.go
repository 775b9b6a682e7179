package pool

import (
	"os"
	"os/exec"
	"path/filepath"
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
