// Package kvm answers one question: can this machine run a guest with KVM? That
// /dev/kvm is there and all its calls succeed does not say so: a virtual machine
// without nested virtualisation may offer a KVM that interprets the guest's
// instructions one by one, about a thousand times slower, until it meets one
// that it does not know. So a small guest is run, which does what every kernel
// does in its first milliseconds. The package runs no other guests.
package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

// Verdict is the answer.
type Verdict struct {
	Usable  bool
	Stage   string        // how far the guest got: 12345 is all the way
	Exit    string        // why it stopped: HLT, TIMEOUT, INTERNAL_ERROR/1, …
	Elapsed time.Duration // that the guest ran
	Err     error         // why not
	TSCkHz  int           // the rate of this machine's time stamp counter; 0 is unknown
}

// Reason says in one sentence why guests can't run with KVM. It is empty if
// they can.
func (v Verdict) Reason() string {
	switch {
	case v.Usable:
		return ""
	case v.Err == nil:
		return "KVM was not tried."
	case errors.Is(v.Err, fs.ErrNotExist):
		return "There is no /dev/kvm: the module kvm_intel or kvm_amd is not loaded, or virtualisation is switched off in the firmware."
	case errors.Is(v.Err, fs.ErrPermission):
		return "This user may not open /dev/kvm: it needs root or the group kvm."
	case errors.Is(v.Err, unix.EBUSY):
		return "Another hypervisor on this machine holds the CPU's virtualisation."
	case v.Exit != "":
		return fmt.Sprintf("/dev/kvm answers, but it does not run a guest: %v (stage %q, %s).", v.Err, v.Stage, v.Exit)
	default:
		return fmt.Sprintf("/dev/kvm does not work: %v.", v.Err)
	}
}
