package pool

import (
	"fmt"
	"os/exec"

	"github.com/containerd/errdefs"
)

// Tool finds a program that makes or changes file systems, also where only
// root's PATH leads: `su` without a dash keeps a user's. A missing one is an
// error that says which package to install.
func Tool(name, pkg string) (string, error) {
	for _, where := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(where); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is missing: apt-get install %s: %w", name, pkg, errdefs.ErrFailedPrecondition)
}
