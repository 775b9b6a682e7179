package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestInRoot: only what is wrong with a path is said to be.
func TestInRoot(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "none", "file/in", "loop", ".", "a\x00b", strings.Repeat("n", 256)} {
		if _, err := inRoot(dir, path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", path, err)
		}
	}
	if path, err := inRoot(dir, "/../file"); err != nil || path != filepath.Join(dir, "file") {
		t.Errorf("%s, %v", path, err)
	}

	var first unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &first); err != nil {
		t.Fatal(err)
	}
	next, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	one := uint64(next.Fd()) + 1
	next.Close()
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &first)
	for _, most := range []uint64{one - 1, one} { // the directory can't be opened, or its file
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: first.Max}); err != nil {
			t.Fatal(err)
		}
		if _, err := inRoot(dir, "file"); !errors.Is(err, unix.EMFILE) || errdefs.IsInvalidArgument(err) {
			t.Errorf("with no more files: %v", err)
		}
	}
}
