package run_test

import (
	"context"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

func start(t *testing.T, name string, args ...string) (*run.Process, uint64) {
	t.Helper()
	c := exec.Command(name, args...)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill() })
	when, err := run.StartTime(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := run.FindProcess(c.Process.Pid, when)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, when
}

func TestProcessEndIsNoticedAndReaped(t *testing.T) {
	p, when := start(t, "sleep", "60")
	early, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := p.Wait(early); err == nil {
		t.Fatal("it has not ended")
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(p.PID)); err == nil {
		t.Error("it was not reaped")
	}
	if _, err := run.FindProcess(p.PID, when); !errdefs.IsNotFound(err) {
		t.Errorf("find it again: %v", err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Errorf("signal what has ended: %v", err)
	}
}

func TestStopped(t *testing.T) {
	p, _ := start(t, "sleep", "60")
	for _, c := range []struct {
		signal unix.Signal
		stands bool
	}{{unix.SIGSTOP, true}, {unix.SIGCONT, false}} {
		if err := p.Signal(c.signal); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(5 * time.Second); run.Stopped(p.PID) != c.stands; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("after %v it stands: %v", c.signal, !c.stands)
			}
		}
	}
	if run.Stopped(0) {
		t.Error("nobody stands still")
	}
}

func TestProcessOfAnotherStartTimeIsNotFound(t *testing.T) {
	p, when := start(t, "sleep", "60")
	if _, err := run.FindProcess(p.PID, when+1); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestZombieIsDead(t *testing.T) {
	c := exec.Command("true")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := run.FindProcess(c.Process.Pid, 0)
	if err == nil { // still running: wait without reaping
		defer p.Close()
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, c.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := run.FindProcess(c.Process.Pid, 0); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	c.Wait()
}

func TestStopInsists(t *testing.T) {
	p, _ := start(t, "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		t.Error(err)
	}
}
