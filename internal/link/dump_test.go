package link

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/need"
)

// TestMain runs the tests in a network namespace of their own, with a view of it in
// /sys.
func TestMain(m *testing.M) {
	if os.Getenv("IN_NETNS") != "" {
		for _, err := range []error{
			unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""), unix.Mount("sysfs", "/sys", "sysfs", 0, ""),
		} {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
	if os.Getenv("IN_NETNS") != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), "IN_NETNS=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if err := c.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// A list that is asked for while interfaces come and go is whole.
func TestListWhileChanging(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	const there = 40 // pairs: more than fit one message of the kernel's
	for i := range there {
		if _, err := EnsureVeth(fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := EnsureVeth("come", "go", nil); err != nil {
				t.Error(err)
				return
			}
			if err := Remove("come"); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer changing.Wait()
	defer close(stop)
	for range 300 {
		all, err := List()
		if err != nil {
			t.Fatal(err)
		}
		if len(all) < 2*there {
			t.Fatalf("%d interfaces of at least %d", len(all), 2*there)
		}
	}
}
