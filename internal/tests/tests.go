// Package tests is what the tests of several packages share. What a test cannot do
// without, and asks for, is in package need.
package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// apart is set for a process that has the namespaces: to begin in them, or when they are
// as they should be. A fuzzing test starts workers in them, as this process again.
const apart = "INGOT_TEST_APART"

// Apart is for TestMain: it runs the tests in network and mount namespaces of their own,
// so that what they make there ends with them and nobody else sees it. There own is
// called before them. Who is not root has no such namespaces, and tests that need them
// ask package need. It does not return.
func Apart(m *testing.M, own ...func() error) {
	if os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	switch os.Getenv(apart) {
	case "begin":
		if err := begin(own); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fallthrough
	case "begun":
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), apart+"=begin")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func begin(own []func() error) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, f := range own {
		if err := f(); err != nil {
			return err
		}
	}
	return os.Setenv(apart, "begun")
}

// Fresh mounts an empty file system, or one that shows these namespaces, at a directory.
func Fresh(kind, dir string) func() error {
	return func() error {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
		return nil
	}
}

// Await waits until something is so, of which nobody tells.
func Await(t testing.TB, within time.Duration, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
