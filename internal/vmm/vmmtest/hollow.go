package vmmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Hollow builds the hypervisor with nothing inside, of package hollow, and
// returns its path. It takes the place of QEMU's program, and of a guest's kernel.
func Hollow(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	// Hypervisors run as users of their own, which must be able to run it.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "hollow")
	out, err := exec.Command("go", "build", "-ldflags", "-s -w", "-o", path, "ingot/internal/vmm/hollow").CombinedOutput()
	if err != nil {
		t.Fatalf("build hollow: %v\n%s", err, out)
	}
	return path
}
