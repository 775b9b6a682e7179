//go:build !amd64

package kvm

import "golang.org/x/sys/unix"

// probe makes an empty machine and runs nothing: KVM without the CPU's support
// is known on x86-64 only.
func probe() Verdict {
	f, machine, err := open(device)
	if err != nil {
		return Verdict{Err: err}
	}
	defer f.Close()
	defer unix.Close(machine)
	return Verdict{Usable: true, TSCkHz: TSCkHz()}
}

// TSCkHz is 0: there is no time stamp counter.
func TSCkHz() int { return 0 }
