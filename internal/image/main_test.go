package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"

	"ingot/internal/image/daemon"
	"ingot/internal/pool"
)

// TestMain is four programs. The one that `go test` starts runs itself again
// in a mount namespace of its own, so that no mount and no loop device outlives
// the tests however they end; there the tests run; and they start it as a
// containerd and as a ctr.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("IMAGE_TEST_CONTAINERD") != "":
		os.Exit(containerdMain(os.Getenv("IMAGE_TEST_CONTAINERD")))
	case os.Getenv("IMAGE_TEST_CTR") != "":
		os.Exit(daemon.CTR(context.Background(), os.Args))
	case os.Getenv("IMAGE_TEST_INSIDE") != "" || os.Getuid() != 0:
		os.Exit(m.Run())
	}
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), "IMAGE_TEST_INSIDE=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := again.Run(); err != nil && again.ProcessState == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(again.ProcessState.ExitCode())
}

func containerdMain(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	p, err := pool.Open(ctx, dir, pool.Options{Size: 1000})
	if err == nil {
		err = daemon.Run(ctx, daemon.Config{
			Root: dir + "/root", State: dir + "/state", Socket: dir + "/c.sock", Pool: p.Path(), VolumeSize: 256,
		}, func() { fmt.Println("ready") })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
