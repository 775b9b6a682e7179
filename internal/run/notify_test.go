package run_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ingot/internal/run"
)

// listen is systemd's end, and says what came next, or nothing if nothing does.
func listen(t *testing.T, name string) (next func(time.Duration) string) {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	return func(most time.Duration) string {
		b := make([]byte, 1000)
		c.SetReadDeadline(time.Now().Add(most))
		n, _ := c.Read(b)
		return string(b[:n])
	}
}

func TestNotify(t *testing.T) {
	if err := run.Notify("READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), "@ingot-test-" + strconv.Itoa(os.Getpid())} {
		next := listen(t, name)
		if err := run.Notify("READY=1", "STATUS=serving"); err != nil {
			t.Error(err)
		}
		if got := next(5 * time.Second); got != "READY=1\nSTATUS=serving" {
			t.Errorf("%s got %q", name, got)
		}
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	if err := run.Notify("READY=1"); err == nil {
		t.Error("a socket that is not there is no error")
	}
}

// TestWatchdog: a sign of life comes while there is life, and stays away while not.
func TestWatchdog(t *testing.T) {
	next := listen(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("WATCHDOG_USEC", "200000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	ctx, stop := context.WithCancel(t.Context())
	var dead atomic.Bool
	var looked atomic.Int32
	task := run.Watchdog(quiet, func(ctx context.Context) error {
		looked.Add(1)
		if _, ok := ctx.Deadline(); !ok {
			t.Error("it may look for ever")
		}
		if dead.Load() {
			return errors.New("it hangs")
		}
		return nil
	})
	var running sync.WaitGroup
	running.Go(func() {
		if err := task.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer stop()
	for range 3 {
		if got := next(5 * time.Second); got != "WATCHDOG=1" {
			t.Fatalf("got %q", got)
		}
	}
	dead.Store(true)
	for next(150*time.Millisecond) != "" { // one may be under way
	}
	for before := looked.Load(); looked.Load() < before+3; {
		if got := next(50 * time.Millisecond); got != "" {
			t.Fatalf("dead, and it says %q", got)
		}
	}
	dead.Store(false)
	if got := next(5 * time.Second); got != "WATCHDOG=1" {
		t.Errorf("alive again, and it says %q", got)
	}
}

func TestWatchdogOfNobodyOrAnother(t *testing.T) {
	next := listen(t, filepath.Join(t.TempDir(), "notify"))
	for usec, pid := range map[string]string{"": "", "0": "", "x": "", "2000": "1"} {
		t.Setenv("WATCHDOG_USEC", usec)
		t.Setenv("WATCHDOG_PID", pid)
		ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := run.Watchdog(quiet, func(context.Context) error { return nil }).Run(ctx); err != nil {
			t.Error(err)
		}
		stop()
		if got := next(time.Millisecond); got != "" {
			t.Errorf("WATCHDOG_USEC=%s WATCHDOG_PID=%s: %q", usec, pid, got)
		}
	}
}
