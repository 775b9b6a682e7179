package env

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "01J")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vm.json", "metadata.json", "qemu.cfg", "qemu.log", "qemu.metrics", "qemu.stdout", "qemu.stderr", "qemu.pid"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want string) {
		t.Helper()
		err := private(dir)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	expect("")
	os.Chmod(filepath.Join(dir, "metadata.json"), 0o644)
	expect("metadata.json has mode 0644")
	os.Remove(filepath.Join(dir, "metadata.json"))
	expect("has no metadata.json")
	os.Remove(filepath.Join(dir, "qemu.pid")) // never started
	expect("")
	os.Chmod(dir, 0o755)
	expect("01J has mode 0755")
	os.Remove(filepath.Join(dir, "vm.json")) // being removed
	expect("")
}
