package web

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What is told of an error is one of a few words, whatever its text is.
func TestReason(t *testing.T) {
	for want, err := range map[string]error{
		"not_found":          fmt.Errorf("make interface eth1: no bridge br7: %w", errdefs.ErrNotFound),
		"unavailable":        fmt.Errorf("prepare images: %w", fmt.Errorf("pull image x: %w", errdefs.ErrUnavailable)),
		"resource_exhausted": fmt.Errorf("write: %w", unix.ENOSPC),
		"deadline_exceeded":  fmt.Errorf("start qemu: %w", context.DeadlineExceeded),
		"canceled":           context.Canceled,
		"other":              errors.New("exit status 1"),
	} {
		if got := reason(err); got != want {
			t.Errorf("%v is %s, not %s", err, got, want)
		}
	}
	if got := reason(errors.Join(errdefs.ErrInternal, errdefs.ErrInvalidArgument)); got != "invalid_argument" {
		t.Errorf("two kinds at once: %s", got)
	}
}
