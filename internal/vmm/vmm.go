// Package vmm is the contract between a host and the hypervisors: a Driver
// starts microVMs and finds those that an earlier process started; a Machine is
// one that runs. It owns no processes itself; its sub-packages do, one each, and
// package vmmtest holds all of them to the same behaviour.
package vmm

import (
	"context"
	"io"
	"net"
	"os"
	"time"

	"ingot/internal/vm"
)

// Feature is something that not every driver can do.
type Feature string

// The features.
const (
	Macvtap  Feature = "macvtap"
	Virtiofs Feature = "virtiofs"
	Agent    Feature = "agent"
	Pause    Feature = "pause"
	Snapshot Feature = "snapshot"
	Grow     Feature = "grow"
)

// Driver starts microVMs with one kind of hypervisor.
type Driver interface {
	// Name is the driver's name as a spec gives it: qemu, firecracker, cloudhypervisor.
	Name() string
	// Facts says whether the driver can be used on this machine, and how.
	Facts() Facts
	// Features lists what the driver can do beyond the contract.
	Features() []Feature
	// Start boots a microVM. The hypervisor outlives this process. On error, or
	// when ctx ends before Start returns, nothing is left behind.
	Start(ctx context.Context, c Config) (Machine, error)
	// Attach finds the microVM that was started in dir, by this process or an
	// earlier one, also one whose hypervisor does not answer. errdefs.ErrNotFound means
	// that none runs there; if one has ended, watched or not, the error is an *Ended
	// that says how. What runs there and was lost, with its files, is ended: it is known
	// by its uid, if dir is named after that. A Machine that this process has of it
	// must be closed before: a hypervisor listens to one.
	Attach(ctx context.Context, dir string) (Machine, error)
}

// Facts are a driver's state on this machine.
type Facts struct {
	Available   bool
	Version     string
	Accelerator string // kvm or tcg
	Reason      string // why it is not available, or why not with KVM
	AttachOnly  bool   // it starts no microVM, here or elsewhere, and only finds those that run
}

// Config is all that a driver needs for one microVM. Disks and network cards
// come as open files, because the hypervisor runs as another user. Start uses
// the files but does not close them. Dir stays the caller's: the hypervisor needs
// no way into it.
type Config struct {
	UID    string // the microVM's uid, for the process's name
	Dir    string // the state directory; files in it are named after the driver: qemu.pid, qemu.stdout
	User   int    // uid and gid that the hypervisor runs as; 0 stays root
	VCPU   int
	Memory vm.MiB

	Kernel  string   // path of an ELF vmlinux or a bzImage; User must be allowed to read the file, not to enter its directory
	Initrd  string   // path, or empty; likewise
	Cmdline []string // without what the driver itself must add (console, TSC)

	Disks []Disk // vda, vdb, … in the guest
	NICs  []NIC  // eth0, eth1, … in the guest
	Agent bool   // make a channel to the guest's agent
	// Spawned, if not nil, is told of the hypervisor's process as soon as it is
	// there, and found again by Attach: before it answers, and before Start returns.
	Spawned func(pid int)
}

// Disk is one virtio block device.
type Disk struct {
	ID       string
	File     *os.File
	ReadOnly bool
}

// NIC is one virtio network card. File is the open tap or macvtap device.
type NIC struct {
	ID   string
	File *os.File
	MAC  net.HardwareAddr
}

// State is what a hypervisor says of its guest.
type State string

// The states.
const (
	Running State = "running"
	Paused  State = "paused"
	Dead    State = "dead"
)

// Cause is why a microVM ended.
type Cause string

// The causes.
const (
	PowerOff Cause = "power-off" // the guest switched itself off
	Reboot   Cause = "reboot"    // the guest asked for a restart; the hypervisor has ended
	Panic    Cause = "panic"     // the guest's kernel gave up
	Stopped  Cause = "stopped"   // Press or Kill, by us
	Killed   Cause = "killed"    // a signal that was not ours
	Error    Cause = "error"     // the hypervisor failed
	Unknown  Cause = "unknown"   // it ended while nobody watched, and left no word
)

// Exit is how a microVM ended.
type Exit struct {
	Cause  Cause     `json:"cause"`
	Detail string    `json:"detail,omitempty"` // "signal: killed", the last line of stderr, …
	At     time.Time `json:"at"`
}

// Metrics are what a hypervisor uses, or how it ended.
type Metrics struct {
	At       time.Time     `json:"at"`
	CPU      time.Duration `json:"cpu_ns,omitempty"`         // so far, with its guest's
	Resident int64         `json:"resident_bytes,omitempty"` // memory that it holds now
	Exit     *Exit         `json:"exit,omitempty"`
}

// Ended is the error of an Attach that finds a microVM which has ended. It is
// an errdefs.ErrNotFound.
type Ended struct{ Exit Exit }

// Machine is a microVM that runs, or has run. Its methods may be called from
// several goroutines.
type Machine interface {
	// PID is the hypervisor's process id.
	PID() int
	// Started is when it was started.
	Started() time.Time
	// State asks the hypervisor.
	State(ctx context.Context) (State, error)
	// Press presses the guest's power button, which not every guest feels, and
	// waits for nothing. (The host asks the guest's agent first.)
	Press(ctx context.Context) error
	// Kill ends the hypervisor at once and returns when it is gone.
	Kill() error
	// Done is closed when the hypervisor has ended, at once and without polling.
	Done() <-chan struct{}
	// Exit says how it ended. It may be called once Done is closed.
	Exit() Exit
	// Console connects to the serial console. One connection at a time: the host
	// multiplexes. Who connects must read: a guest whose output is not taken is
	// held up, by seconds a line. The boot log is in the state directory either way.
	Console(ctx context.Context) (io.ReadWriteCloser, error)
	// Agent connects to the channel of the guest's agent. One at a time.
	Agent(ctx context.Context) (net.Conn, error)
	// Pause and Resume stop and continue the guest's CPUs.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Grow has the guest see at once that a disk, by its place in Config.Disks, has
	// become so many bytes large. The caller has made its file so large before. Less
	// than the guest has is an errdefs.ErrInvalidArgument and changes nothing; a
	// driver without the feature answers errdefs.ErrNotImplemented.
	Grow(ctx context.Context, disk int, size int64) error
	// Metrics says what the hypervisor uses. The answer is also appended to the
	// metrics file in the state directory, a JSON object a line; so is the end.
	Metrics(ctx context.Context) (Metrics, error)
	// Close lets go of the microVM without ending it: connections, watches. Attach finds it again.
	Close() error
}
