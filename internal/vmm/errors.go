package vmm

import (
	"fmt"

	"github.com/containerd/errdefs"
)

func (e *Ended) Error() string {
	if e.Exit.Detail == "" {
		return fmt.Sprintf("microVM has ended: %s", e.Exit.Cause)
	}
	return fmt.Sprintf("microVM has ended: %s (%s)", e.Exit.Cause, e.Exit.Detail)
}

// Unwrap makes an Ended an errdefs.ErrNotFound.
func (e *Ended) Unwrap() error { return errdefs.ErrNotFound }
