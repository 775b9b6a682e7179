package env

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"ingot/internal/kvm"
	"ingot/internal/lab"
)

// Down removes an environment: its microVMs, machines, files and traces. It works
// as well on one that is half made or half removed: what is there is found by
// its names.
func Down(ctx context.Context, name string, out io.Writer) error {
	if os.Getuid() != 0 {
		return fmt.Errorf("ingot down needs root: `sudo ingot down`: %w", errdefs.ErrFailedPrecondition)
	}
	lock, err := lockEnvironment(ctx, name, out)
	if err != nil {
		return err
	}
	err = down(ctx, Env{Name: name}, out)
	err = errors.Join(err, lock.Release())
	if lock, err := lockMachine(ctx); err == nil { // an `up` that was killed leaves its file
		lock.Release()
	}
	if left, err := others(name); err == nil && len(left) == 0 {
		os.Remove(kvm.CacheFile)
	}
	os.Remove(RunRoot) // both only if they are empty: other environments keep them
	os.Remove(Root)
	return err
}

func down(ctx context.Context, e Env, out io.Writer) error {
	if there, err := e.traces(); err != nil || !there {
		fmt.Fprintf(out, "there is no environment %s\n", e.Name)
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	leaveTailnet(ctx, e.Name, binary, out)
	if err := e.Lab(binary).Remove(ctx); err != nil {
		return fmt.Errorf("take %s down: %w", e.Name, err)
	}
	fmt.Fprintln(out, "machines, microVMs and network removed")
	// Aside first: an `up` that finds half of the files would build on them.
	if err := os.Rename(e.Dir(), e.aside()); err != nil && !errors.Is(err, os.ErrNotExist) {
		if err = errors.Join(os.RemoveAll(e.aside()), os.Rename(e.Dir(), e.aside())); err != nil {
			return fmt.Errorf("take %s down: %w", e.Name, err)
		}
	}
	if err := os.RemoveAll(e.aside()); err != nil {
		return fmt.Errorf("take %s down: %w", e.Name, err)
	}
	fmt.Fprintf(out, "%s removed\n", e.Dir())
	return nil
}

// aside is where the files are while they are being removed. No environment is
// called so.
func (e Env) aside() string { return filepath.Join(Root, ".removed-"+e.Name) }

func (e Env) traces() (bool, error) {
	for _, path := range []string{e.Dir(), e.RunDir(), e.aside()} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			return true, err
		}
	}
	return false, nil
}

// lockEnvironment lets one `up` or `down` of an environment run at a time.
func lockEnvironment(ctx context.Context, name string, out io.Writer) (*lab.FileLock, error) {
	return lab.Lock(ctx, filepath.Join(RunRoot, name+".lock"), func() {
		fmt.Fprintf(out, "another `ingot up` or `down` of %s is at work: waiting for it\n", name)
	})
}

// lockMachine lets one environment at a time choose its network and name.
func lockMachine(ctx context.Context) (*lab.FileLock, error) {
	return lab.Lock(ctx, filepath.Join(RunRoot, ".environments.lock"), nil)
}
