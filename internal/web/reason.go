package web

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// reasons are the kinds of error, and how they are known: a few, so that a label can
// have them. The first that fits is it.
var reasons = []struct {
	name string
	is   func(error) bool
}{
	{"canceled", func(err error) bool { return errdefs.IsCanceled(err) || errors.Is(err, context.Canceled) }},
	{"deadline_exceeded", func(err error) bool {
		return errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded)
	}},
	{"resource_exhausted", func(err error) bool {
		return errdefs.IsResourceExhausted(err) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EMFILE)
	}},
	{"invalid_argument", errdefs.IsInvalidArgument},
	{"not_found", errdefs.IsNotFound},
	{"already_exists", errdefs.IsAlreadyExists},
	{"failed_precondition", errdefs.IsFailedPrecondition},
	{"permission_denied", errdefs.IsPermissionDenied},
	{"unauthenticated", errdefs.IsUnauthorized},
	{"not_implemented", errdefs.IsNotImplemented},
	{"unavailable", errdefs.IsUnavailable},
	{"internal", errdefs.IsInternal},
}

// reason is the kind of an error.
func reason(err error) string {
	for _, r := range reasons {
		if r.is(err) {
			return r.name
		}
	}
	return "other"
}
