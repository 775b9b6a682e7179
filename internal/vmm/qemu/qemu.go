// Package qemu is the QEMU driver: one process a microVM, of the machine type
// microvm, with KVM where that runs guests and with TCG, QEMU's translator,
// where it does not. It owns the process, and in the microVM's state directory
// the files that begin with "qemu." and runtime.json. It makes no taps, disks or
// directories, and knows no images.
//
// The process runs as another user and needs nothing of the state directory by
// path: logs, disks, taps, the kernel and the sockets are given to it open. The
// sockets lie in the state directory too, whose path may be longer than the 107
// bytes that a socket's path may have; they are bound and dialled by way of
// /proc/self/fd.
package qemu

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"

	"ingot/internal/kvm"
	"ingot/internal/vmm"
)

// Name is the driver's, in a spec and in the names of its files.
const Name = "qemu"

// DefaultTBSize is how many MiB TCG may keep of translated code. QEMU's own
// default is up to 1024, more than a small guest has memory.
const DefaultTBSize = 32

// Config says how the driver runs QEMU. The zero value is of use.
type Config struct {
	Binary string      // qemu-system-x86_64 in PATH, if empty
	KVM    kvm.Verdict // whether guests can run with KVM; the zero value is no
	TBSize int         // MiB of translated code; DefaultTBSize, if 0
	Log    *slog.Logger
}

// Driver starts microVMs with QEMU.
type Driver struct {
	Config

	mu      sync.Mutex // guards what follows
	version string     // QEMU's, once it was heard
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a driver. It does not look whether there is a QEMU: Facts does.
func New(c Config) *Driver {
	c.Binary = cmp.Or(c.Binary, "qemu-system-x86_64")
	c.TBSize = cmp.Or(c.TBSize, DefaultTBSize)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{Config: c}
}

// askVersion asks QEMU until it has answered once.
func (d *Driver) askVersion() (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.version == "" {
		v, err := version(d.Binary)
		if err != nil {
			return "", err
		}
		d.version = v
	}
	return d.version, nil
}

// Name is "qemu".
func (d *Driver) Name() string { return Name }

// Features lists what the driver can do beyond the contract.
func (d *Driver) Features() []vmm.Feature {
	return []vmm.Feature{vmm.Macvtap, vmm.Agent, vmm.Pause, vmm.Grow}
}

// Facts says whether QEMU is there, and what guests run with.
func (d *Driver) Facts() vmm.Facts {
	f := vmm.Facts{Accelerator: d.accelerator()}
	if runtime.GOARCH != "amd64" {
		f.Reason = "the machine type microvm is x86-64's; this machine is " + runtime.GOARCH
		return f
	}
	v, err := d.askVersion()
	if err != nil {
		f.Reason = err.Error()
		return f
	}
	f.Available, f.Version = true, v
	if !d.KVM.Usable {
		f.Reason = d.KVM.Reason() + " Guests are translated instead of run by the CPU."
	}
	return f
}

func (d *Driver) accelerator() string {
	if d.KVM.Usable {
		return "kvm"
	}
	return "tcg"
}

// version asks a QEMU for its version: 7.2.22.
func version(binary string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask QEMU for its version: %w", err)
	}
	_, rest, _ := strings.Cut(string(out), "version ")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return "", fmt.Errorf("ask %s for its version: unknown answer %.60q", binary, out)
	}
	return fields[0], nil
}
