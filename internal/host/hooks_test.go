package host

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/vmm"
)

// TestHooks: each step is told of once, and what failed is no time that a step takes.
func TestHooks(t *testing.T) {
	var told []string
	tell := func(format string, args ...any) { told = append(told, fmt.Sprintf(format, args...)) }
	hooks := Hooks{
		Took:   func(w Work, step string, _ time.Duration) { tell("%s %q", w, step) },
		Failed: func(w Work, step string, err error) { tell("%s %q: %v", w, step, err) },
		Ended:  func(cause vmm.Cause, again bool) { tell("%s %v", cause, again) },
	}
	expect := func(what string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, told); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
		told = nil
	}
	c := course{hooks: hooks, asked: time.Now()}
	c.boot()
	c.next("pull")
	c.next("network")
	c.failed(io.EOF)
	expect("a create that fails", `create "pull"`, `create "network": EOF`)
	c.boot()
	c.failed(io.EOF)
	expect("one that fails before its first step", `create "": EOF`)
	c.boot()
	c.next("pull")
	c.boot() // what was asked for is something else now
	c.next("pull")
	c.next("boot")
	c.runs()
	c.booted(time.Second)
	expect("one that is interrupted, and then runs", `create "pull"`, `create "boot"`, `create ""`, `create "guest"`)
	c.boot()
	c.next("boot")
	c.runs()
	expect("a later start", `start "boot"`)
	c.leave(Stopping)
	c.booted(time.Second)
	c.leave(Deleting)
	c.next("record")
	c.deleted(time.Now())
	expect("a stop and a delete", `delete "record"`, `delete ""`)
	c.asked = time.Now()
	c.leave(Stopping)
	c.boot()
	c.next("boot")
	c.runs()
	expect("a start of what was stopped before it ran", `start "boot"`)

	h := New(Config{Log: slog.New(slog.DiscardHandler), Hooks: hooks})
	r := testRecord(t.TempDir(), "one")
	if err := r.create(); err != nil {
		t.Fatal(err)
	}
	v := newInstance(h, r)
	v.ended(vmm.Exit{Cause: vmm.Panic, At: time.Now()})
	v.failed(errors.New("no"))
	v.ended(vmm.Exit{Cause: vmm.PowerOff, At: time.Now()})
	expect("ends", `panic true`, ` "": no`, `power-off false`)
}
