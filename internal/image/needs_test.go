package image

import (
	"os"
	"os/exec"
	"testing"
)

// needs skips a test where root, loop devices or one of these programs are
// missing; with INGOT_NEED=all it fails.
func needs(t testing.TB, programs ...string) {
	t.Helper()
	missing := t.Skipf
	if os.Getenv("INGOT_NEED") == "all" {
		missing = t.Fatalf
	}
	if os.Getuid() != 0 {
		missing("needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		missing("needs loop devices: %v", err)
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing("needs %s", p)
		}
	}
}
