package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"ingot/internal/need"
)

// Of several that need a key at the same time all get the same, also where one
// before them was killed between its two halves.
func TestMakeSSHKey(t *testing.T) {
	need.Binary(t, "ssh-keygen")
	for _, killed := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), privateKey)
		if killed {
			if err := makeSSHKey(t.Context(), path, "first"); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(path + ".pub"); err != nil {
				t.Fatal(err)
			}
		}
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				if err := makeSSHKey(t.Context(), path, "ingot-test"); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		public, err := os.ReadFile(path + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		if want := keygen(t, "-y", "-f", path); strings.Fields(string(public))[1] != strings.Fields(want)[1] {
			t.Errorf("the halves differ: %s, %s", public, want)
		}
		if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".new-*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// A microVM's host keys replace those that it had, and the file stays small.
func TestTrust(t *testing.T) {
	k := sshKeys{dir: t.TempDir()}
	for n := range knownMicroVMs + 10 {
		if err := k.trust(fmt.Sprintf("UID%d", n), "ssh-ed25519 AAA comment\n"); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.trust("UID100", "ssh-ed25519 BBB c\necdsa CCC\n\nnoise\n"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(k.dir, knownHosts))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) > knownMicroVMs+2 || slices.Contains(lines, "UID100 ssh-ed25519 AAA") {
		t.Errorf("%d lines", len(lines))
	}
	if got := lines[len(lines)-2:]; !slices.Equal(got, []string{"UID100 ssh-ed25519 BBB", "UID100 ecdsa CCC"}) {
		t.Errorf("the last: %q", got)
	}
}

func keygen(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ssh-keygen", args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
