// Command init is the first program in a microVM. As PID 1 of the initramfs it
// loads the drivers, asks for an address while it mounts the root file system,
// and then either hands over to the image's own init or stays and runs the
// image's process. It is also the guest's agent: for an image with an init of
// its own, a second process of it, started by systemd or before the hand-over.
//
// It owns the guest's first seconds and, where the image has no init, its
// processes, its lease and its end. It is small and static, and does without
// everything that a boot does not need: no net package, no netlink library, no
// YAML.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		check(runAgent())
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "ingot init: this is a microVM's init, not a command")
		os.Exit(2)
	}
	check(boot())
}

// check ends the process on an error. As PID 1 that is a kernel panic, which the
// hypervisor sees, with the reason on the console before it.
func check(err error) {
	if err != nil {
		say("%v", err)
		os.Exit(1)
	}
}

// say writes a line to the console, with the time since the kernel's start, as
// the kernel does.
func say(format string, args ...any) {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // zero where there is none
	fmt.Fprintf(os.Stderr, "[%5d.%06d] ingot: "+format+"\n", append([]any{t.Sec, t.Nsec / 1000}, args...)...)
}
