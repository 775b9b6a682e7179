package env

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"

	"ingot/api/types"
	"ingot/internal/nat"
)

// MicroVM is a microVM that a file declares, or the flags of `ingot run`.
type MicroVM struct {
	Name      string            `yaml:"name" json:"name"`
	Namespace string            `yaml:"namespace,omitempty" json:"namespace,omitempty"`
	Host      string            `yaml:"host,omitempty" json:"-"`    // empty: the one with most room
	Address   string            `yaml:"address,omitempty" json:"-"` // that DHCP keeps for it; empty: any
	Image     string            `yaml:"image,omitempty" json:"image,omitempty"`
	Kernel    string            `yaml:"kernel,omitempty" json:"kernel,omitempty"`
	Driver    string            `yaml:"driver,omitempty" json:"driver,omitempty"`
	CPUs      int32             `yaml:"cpus,omitempty" json:"cpus,omitempty"`
	Memory    int32             `yaml:"memory,omitempty" json:"memory,omitempty"` // MiB
	Disk      int32             `yaml:"disk,omitempty" json:"disk,omitempty"`     // MiB at least; 0: as large as the host makes them
	Command   []string          `yaml:"command,omitempty" json:"command,omitempty"`
	Env       map[string]string `yaml:"env,omitempty" json:"env,omitempty"`
	Labels    map[string]string `yaml:"labels,omitempty" json:"labels,omitempty"`
	Restart   string            `yaml:"restart,omitempty" json:"restart,omitempty"`
	// AllowedAddresses are what it may use beside its own: addresses and prefixes.
	AllowedAddresses []string `yaml:"allowed_addresses,omitempty" json:"allowed_addresses,omitempty"`
	// Ports are those of the hub that lead to it, and no part of the microVM itself.
	Ports  []nat.Port `yaml:"ports,omitempty" json:"-"`
	Egress []string   `yaml:"egress,omitempty" json:"-"` // likewise: what it may open outside
	// Spec is all of it in the words of flintlock's API, instead of what is above
	// from Image on.
	Spec map[string]any `yaml:"spec,omitempty" json:"spec,omitempty"`
}

// The defaults of what is left out.
const (
	DefaultNamespace = "default"
	DefaultKernel    = "kernel" // of the environment's own registry
	DefaultMemory    = 256      // MiB
	DefaultRestart   = "always"
)

// RestartPolicies are the words for when a microVM is started again.
var RestartPolicies = map[string]types.RestartPolicy{
	"always": types.RestartPolicy_ALWAYS, "on-failure": types.RestartPolicy_ON_FAILURE, "never": types.RestartPolicy_NEVER,
}

// declared is the label by which `up` knows a microVM of the file: its value
// changes with the declaration.
const declared = "ingot/declared"

// String is the microVM's name with its namespace.
func (m MicroVM) String() string { return cmp.Or(m.Namespace, DefaultNamespace) + "/" + m.Name }

// print changes when the declaration does. Where it is to be is no part of it, nor at
// which address.
func (m MicroVM) print() string {
	m.Namespace = cmp.Or(m.Namespace, DefaultNamespace)
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // Proto has refused it
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))[:12]
}

// Proto is the microVM as flintlock's API has it. The error is about Spec.
func (m MicroVM) Proto() (*types.MicroVMSpec, error) {
	if m.Spec != nil {
		return m.given()
	}
	kernel, image := cmp.Or(m.Kernel, DefaultKernel), m.Image
	spec := &types.MicroVMSpec{
		Id: m.Name, Namespace: cmp.Or(m.Namespace, DefaultNamespace), Labels: maps.Clone(m.Labels),
		Vcpu: cmp.Or(m.CPUs, 1), MemoryInMb: cmp.Or(m.Memory, DefaultMemory),
		Kernel:          &types.Kernel{Image: kernel, Filename: new("boot/vmlinux"), AddNetworkConfig: true},
		Initrd:          &types.Initrd{Image: kernel, Filename: new("boot/initrd")},
		RootVolume:      &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &image}},
		Interfaces:      []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP}},
		AllowGuestAgent: true,
		RestartPolicy:   RestartPolicies[cmp.Or(m.Restart, DefaultRestart)].Enum(),

		AllowedAddresses: m.AllowedAddresses,
	}
	if m.Driver != "" {
		spec.Provider = &m.Driver
	}
	if m.Disk != 0 {
		spec.RootVolume.SizeInMb = &m.Disk
	}
	if len(m.Command) > 0 || len(m.Env) > 0 {
		spec.Process = &types.Process{Args: m.Command, Env: m.Env}
	}
	return spec, nil
}

// protoPreamble is about a text that the user did not write.
var protoPreamble = regexp.MustCompile(`^proto:[\s\x{a0}]*(?:\(line \d+:\d+\):[\s\x{a0}]*)?`)

// given reads Spec. A field that the API does not have is an error.
func (m MicroVM) given() (*types.MicroVMSpec, error) {
	b, err := json.Marshal(m.Spec)
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	spec := &types.MicroVMSpec{}
	if err := protojson.Unmarshal(b, spec); err != nil {
		return nil, errors.New(protoPreamble.ReplaceAllString(err.Error(), ""))
	}
	if spec.GetId() != "" || spec.GetNamespace() != "" || spec.GetUid() != "" {
		return nil, errors.New("id, namespace and uid don't belong here: name and namespace stand beside it")
	}
	spec.Id, spec.Namespace = m.Name, cmp.Or(m.Namespace, DefaultNamespace)
	return spec, nil
}

// wanted is Proto with the label of what is declared.
func (m MicroVM) wanted() (*types.MicroVMSpec, error) {
	spec, err := m.Proto()
	if err != nil {
		return nil, err
	}
	if spec.Labels == nil {
		spec.Labels = map[string]string{}
	}
	spec.Labels[declared] = m.print()
	return spec, nil
}

// ParseMemory reads a quantity of memory as MiB.
func ParseMemory(s string) (int32, error) {
	number, factor := s, int64(1)
	for suffix, f := range map[string]int64{"M": 1, "MiB": 1, "G": 1 << 10, "GiB": 1 << 10} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			number, factor = n, f
		}
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n <= 0 || n > (1<<31-1)/factor {
		return 0, fmt.Errorf("it must be a number of MiB, or one with M or G")
	}
	return int32(n * factor), nil
}
