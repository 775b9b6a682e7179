package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"ingot/internal/need"
)

// A process is measured as the kernel has it: this one.
func TestMeasureProcess(t *testing.T) {
	until := time.Now().Add(50 * time.Millisecond)
	for time.Now().Before(until) { // the kernel counts in hundredths of a second
	}
	before := written(t)
	u, err := measureProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if after := written(t); u.Written < before || u.Written > after {
		t.Errorf("%d bytes written, and not between %d and %d", u.Written, before, after)
	}
	if u.CPU < 20*time.Millisecond || u.CPU > time.Hour || u.Resident < 1<<20 || u.Resident > 1<<34 {
		t.Errorf("%+v", u)
	}
	if _, err := measureProcess(1 << 30); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nobody: %v", err)
	}
}

// written is what this process has written, after it has written some more where that
// counts.
func written(t *testing.T) (n int64) {
	t.Helper()
	if err := os.WriteFile(t.TempDir()+"/some", make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	need.IOAccounting(t)
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\nwrite_bytes: ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// Who has no time gets what there was time for, and is told that it is not all.
func TestUsageWithoutTime(t *testing.T) {
	h := New(Config{Log: slog.New(slog.DiscardHandler)})
	r := testRecord(t.TempDir(), "one")
	h.register(newInstance(h, r))
	ctx, cancel := context.WithCancel(t.Context())
	all, err := h.Usage(ctx)
	if len(all) != 1 || err != nil || all[0].Spec.UID != r.Spec.UID || all[0].Process != nil {
		t.Errorf("%+v, %v", all, err)
	}
	cancel()
	if all, err = h.Usage(ctx); len(all) != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", all, err)
	}
}
