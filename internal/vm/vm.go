// Package vm says what a microVM is: its spec, its status, its states and its
// names, and which specs are valid. It owns no resources and does no I/O.
package vm

import (
	"net/netip"
	"time"
)

// MiB is a quantity of memory in mebibytes.
type MiB int64

// Bytes is the quantity in bytes.
func (m MiB) Bytes() int64 { return int64(m) << 20 }

// Defaults of a spec that leaves a field out, and the limits of one that does not.
const (
	DefaultNamespace = "default"
	DefaultVCPU      = 2
	DefaultMemory    = MiB(1024)
	MaxVCPU          = 64
	MinMemory        = MiB(64)
	MaxMemory        = MiB(1 << 20)
)

// Spec is what was asked for. Once the microVM is recorded, only the sizes of its
// volumes change, and what is Mutable.
type Spec struct {
	UID       string            `json:"uid"` // ULID
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	CreatedAt time.Time         `json:"created_at"`

	VCPU   int    `json:"vcpu"`
	Memory MiB    `json:"memory"`
	Driver string `json:"driver,omitempty"` // empty: the host's default

	Kernel     Kernel      `json:"kernel"`
	Initrd     *File       `json:"initrd,omitempty"`
	Root       Volume      `json:"root"`
	Volumes    []Volume    `json:"volumes,omitempty"` // after root, in order: vdb, vdc, …
	Interfaces []Interface `json:"interfaces"`
	// AllowedAddresses are what the guest may send from beside its own addresses.
	AllowedAddresses []netip.Prefix `json:"allowed_addresses,omitempty"`

	// Metadata is served to the guest; values are the decoded text.
	Metadata map[string]string `json:"metadata,omitempty"`

	GuestAgent bool    `json:"guest_agent,omitempty"`
	Restart    Restart `json:"restart,omitempty"`
	Process    Process `json:"process,omitzero"`
}

// Mutable is what of a spec changes while the microVM lives.
type Mutable struct {
	Labels, Metadata map[string]string
	AllowedAddresses []netip.Prefix
}

// File is one file of an OCI image.
type File struct {
	Image string `json:"image"`
	Path  string `json:"path,omitempty"`
}

// Kernel is the kernel file, and what is added to its command line.
type Kernel struct {
	File
	Cmdline          map[string]string `json:"cmdline,omitempty"`
	AddNetworkConfig bool              `json:"add_network_config,omitempty"`
}

// Volume is a block device made from an OCI image.
type Volume struct {
	ID         string `json:"id"`
	Image      string `json:"image,omitempty"`
	VirtioFS   string `json:"virtiofs,omitempty"`
	ReadOnly   bool   `json:"read_only,omitempty"`
	MountPoint string `json:"mount_point,omitempty"`
	Partition  string `json:"partition,omitempty"`
	Size       MiB    `json:"size,omitempty"` // 0: the pool's default
}

// LinkKind is how an interface meets the host's network.
type LinkKind string

// The kinds of link.
const (
	Macvtap LinkKind = "macvtap"
	Tap     LinkKind = "tap"
)

// Interface is one network card.
type Interface struct {
	ID          string       `json:"id"` // as the guest would name it: eth0
	Kind        LinkKind     `json:"kind"`
	MAC         string       `json:"mac,omitempty"` // empty: made from the uid
	Bridge      string       `json:"bridge,omitempty"`
	Address     netip.Prefix `json:"address,omitzero"`
	Gateway     netip.Addr   `json:"gateway,omitzero"`
	Nameservers []netip.Addr `json:"nameservers,omitempty"`
	Metadata    bool         `json:"metadata,omitempty"` // the metadata service is reached by it
	// Instead is the kind that was asked for, where the host can't do that.
	Instead LinkKind `json:"instead,omitempty"`
	// Because is why it can't.
	Because string `json:"because,omitempty"`
}

// Process overrides what an image without an init of its own runs, as OCI's
// image configuration has it.
type Process struct {
	// Entrypoint goes before Args; one empty word stands for none, whatever the image says.
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Args       []string          `json:"args,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	Dir        string            `json:"dir,omitempty"`
	User       string            `json:"user,omitempty"`
	StopSignal string            `json:"stop_signal,omitempty"` // empty: SIGTERM
	// Attach has it wait until a client asks for it, whose it is then:
	// its streams, its terminal, its signals.
	Attach bool `json:"attach,omitempty"`
}

// IsZero says whether nothing is overridden.
func (p Process) IsZero() bool {
	return len(p.Entrypoint) == 0 && len(p.Args) == 0 && len(p.Env) == 0 &&
		p.Dir == "" && p.User == "" && p.StopSignal == "" && !p.Attach
}

// Restart says what happens when a microVM ends without being asked to.
type Restart string

// The restart policies; the zero value means RestartAlways.
const (
	RestartAlways    Restart = ""           // after a crash or a reboot; a power-off stays stopped
	RestartOnFailure Restart = "on-failure" // after a crash only
	RestartNever     Restart = "never"
)

// Phase is where a microVM is in its life.
type Phase string

// The phases.
const (
	Pending  Phase = "pending"  // recorded, or being prepared
	Starting Phase = "starting" // the VMM is being started
	Running  Phase = "running"
	Paused   Phase = "paused" // its CPUs stand still
	Stopping Phase = "stopping"
	Stopped  Phase = "stopped" // powered off, or stopped on request
	Failed   Phase = "failed"  // gave up
	Deleting Phase = "deleting"
)

// Status is what is.
type Status struct {
	Phase   Phase  `json:"phase"`
	Step    string `json:"step,omitempty"`   // what is being done now: pull, volume, network, boot
	Reason  string `json:"reason,omitempty"` // why it is not running, or why it last failed
	Version int    `json:"version"`          // grows with every change

	UpdatedAt time.Time `json:"updated_at,omitzero"` // of the last change
	DeletedAt time.Time `json:"deleted_at,omitzero"` // when that was asked for

	Driver      string `json:"driver,omitempty"`
	Accelerator string `json:"accelerator,omitempty"` // kvm or tcg
	PID         int    `json:"pid,omitempty"`

	KernelPath string            `json:"kernel_path,omitempty"`
	InitrdPath string            `json:"initrd_path,omitempty"`
	Volumes    map[string]string `json:"volumes,omitempty"` // by volume id: the device or file
	// VolumeSizes are what the guest sees: a spec's size may be one that it does not see yet.
	VolumeSizes map[string]MiB             `json:"volume_sizes,omitempty"`
	Links       map[string]InterfaceStatus `json:"links,omitempty"` // by interface id

	StartedAt       time.Time     `json:"started_at,omitzero"`
	EndedAt         time.Time     `json:"ended_at,omitzero"`
	BootTime        time.Duration `json:"boot_time,omitempty"` // VMM start to agent ready
	AgentReady      bool          `json:"agent_ready,omitempty"`
	Addresses       []netip.Addr  `json:"addresses,omitempty"`
	Restarts        int           `json:"restarts,omitempty"`
	LastCrashAt     time.Time     `json:"last_crash_at,omitzero"`
	LastCrashReason string        `json:"last_crash_reason,omitempty"`
	ExitCode        int           `json:"exit_code,omitempty"`
	Retry           int           `json:"retry,omitempty"` // failed tries in a row
	RetryAt         time.Time     `json:"retry_at,omitzero"`
	Refused         []Refusal     `json:"refused,omitempty"`
}

// Refusal is an address that the guest has lately tried to send from, and may not.
type Refusal struct {
	Interface string     `json:"interface"`
	Address   netip.Addr `json:"address"`
	Packets   uint64     `json:"packets"` // at least
	Since     time.Time  `json:"since"`
}

// InterfaceStatus is an interface as it is on the host.
type InterfaceStatus struct {
	Device   string `json:"device"` // fltap1a2b3c4
	Index    int    `json:"index"`
	MAC      string `json:"mac"` // the host device's, upper case
	GuestMAC string `json:"guest_mac"`
}
