package run_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"ingot/internal/run"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func TestAllEndsTheOthersAndNamesTheFirst(t *testing.T) {
	broken := errors.New("no address")
	ended := false
	err := run.All(t.Context(), quiet,
		run.Func("dhcp", func(context.Context, func()) error { return broken }),
		run.Func("dns", func(ctx context.Context, ready func()) error {
			ready()
			<-ctx.Done()
			ended = true
			return ctx.Err()
		}))
	if !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "dhcp: ") {
		t.Errorf("got %v, want dhcp's error", err)
	}
	if !ended {
		t.Error("dns was not waited for")
	}
}

func TestAllCancelledIsNoError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	task := run.Func("dns", func(ctx context.Context, ready func()) error {
		ready()
		ready() // a second call is harmless
		<-ctx.Done()
		return ctx.Err()
	})
	go func() { <-task.Ready(); cancel() }()
	if err := run.All(ctx, quiet, task); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestATaskThatEndsByItselfIsAnError(t *testing.T) {
	err := run.All(t.Context(), quiet, run.Func("dns", func(context.Context, func()) error { return nil }))
	if err == nil || err.Error() != "dns ended" {
		t.Errorf("got %v", err)
	}
}

func TestCleanup(t *testing.T) {
	var order []int
	var undo run.Cleanup
	undo.Add(func() { order = append(order, 1) })
	undo.Add(func() { order = append(order, 2) })
	undo.Clean()
	undo.Clean()
	if !slices.Equal(order, []int{2, 1}) {
		t.Errorf("cleaned in order %v", order)
	}
	undo.Add(func() { t.Error("released, and run all the same") })
	undo.Release()
	undo.Clean()
}
