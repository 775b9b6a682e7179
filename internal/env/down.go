package env

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"ingot/internal/dns"
)

// Down removes an environment: its microVMs, machines, files and traces. It works
// as well on one that is half made or half removed.
func Down(ctx context.Context, name string, out io.Writer) error {
	if os.Getuid() != 0 {
		return fmt.Errorf("ingot down needs root: sudo ingot down: %w", errdefs.ErrFailedPrecondition)
	}
	e, err := Open(name)
	if err != nil {
		e = Default(name) // what is there is found by its names
	}
	_, errDir := os.Stat(e.Dir())
	_, errRun := os.Stat(e.RunDir())
	if errors.Is(errDir, os.ErrNotExist) && errors.Is(errRun, os.ErrNotExist) {
		fmt.Fprintf(out, "there is no environment %s\n", name)
		return nil
	}
	unlock, err := lock(name, out)
	if err != nil {
		return err
	}
	defer unlock()
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	if err := e.Lab(binary).Remove(ctx); err != nil {
		return fmt.Errorf("take %s down: %w", name, err)
	}
	fmt.Fprintln(out, "machines, microVMs and network removed")
	if err := os.RemoveAll(e.Dir()); err != nil {
		return fmt.Errorf("take %s down: %w", name, err)
	}
	fmt.Fprintf(out, "%s removed\n", e.Dir())
	err = errors.Join(removeIfThere(filepath.Join(RunRoot, name+".lock")))
	os.Remove(RunRoot) // both only if they are empty: other environments keep them
	os.Remove(Root)
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func upstreams() ([]string, error) { return dns.SystemUpstreams() }

// imageStamp names what our images are made of, so that a new guest program makes
// new images.
func imageStamp(init []byte) []byte {
	return fmt.Appendf(nil, "%x\n", sha256.Sum256(init))
}
