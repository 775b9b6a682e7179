// Package flintlock knows what flintlock leaves on a machine: the records of its
// microVMs, as blobs in containerd's content store, and the hypervisors that it has
// started. It reads the records, and has drivers that take over those hypervisors
// without stopping them. It writes no records, starts no hypervisor, and leaves
// taps, leases and snapshots to the host.
package flintlock

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"ingot/internal/vm"
)

// The names of flintlock's hypervisors, in its records and in the names of its files.
const (
	Firecracker     = "firecracker"
	CloudHypervisor = "cloudhypervisor"
)

// Record is what flintlock has written of a microVM, in our words.
type Record struct {
	Spec      vm.Spec
	Deleting  bool
	DeletedAt time.Time // when that was asked for
	Things    Things
}

// Things are what flintlock has made for a microVM, and what of its record has no
// meaning here. The names are flintlock's: they follow from nothing.
type Things struct {
	Version int               `json:"version"`           // of the record
	Devices map[string]string `json:"devices,omitempty"` // by interface, as far as it is known
	Volumes map[string]string `json:"volumes,omitempty"` // by volume: a device, or a socket
	Kernel  string            `json:"kernel,omitempty"`  // the file
	Initrd  string            `json:"initrd,omitempty"`
	Sockets string            `json:"sockets,omitempty"` // a directory outside of the microVM's; empty: there is none
	Unused  []string          `json:"unused,omitempty"`  // fields that have no meaning here
}

// record is flintlock's JSON. The spellings are flintlock's.
type record struct {
	ID      string `json:"id"` // NAMESPACE/NAME/UID
	Version int    `json:"version"`
	Spec    struct {
		Provider   string            `json:"provider"`
		Kernel     kernel            `json:"kernel"`
		Initrd     *file             `json:"initrd"`
		VCPU       int               `json:"vcpu"`
		Memory     int64             `json:"memory_inmb"`
		Interfaces []networkCard     `json:"network_interfaces"`
		Root       volume            `json:"root_volume"`
		Volumes    []volume          `json:"additional_volumes"`
		Metadata   map[string]string `json:"metadata"`
		GuestAgent bool              `json:"allow_guest_agent"`
		CreatedAt  int64             `json:"created_at"` // seconds
		UpdatedAt  int64             `json:"updated_at"`
		DeletedAt  int64             `json:"deleted_at"`
	} `json:"spec"`
	Status struct {
		State      string                  `json:"state"`
		Volumes    map[string]volumeStatus `json:"volumes"`
		Kernel     *mount                  `json:"kernel_mount"`
		Initrd     *mount                  `json:"initrd_mount"`
		Interfaces map[string]device       `json:"network_interfaces"`
		Retry      int                     `json:"retry"`
		NotBefore  int64                   `json:"not_before"`
		VsockPath  string                  `json:"vsock_path"`
	} `json:"status"`
}

type file struct {
	Image string `json:"image"`
	Path  string `json:"Filename"`
}

type kernel struct {
	file
	Cmdline          map[string]string `json:"cmdline"`
	AddNetworkConfig bool              `json:"add_network_config"`
}

type networkCard struct {
	ID        string         `json:"guest_device_name"`
	AllowMMDS bool           `json:"allow_mmds"`
	MAC       string         `json:"guest_mac"`
	Type      string         `json:"type"`
	Address   *staticAddress `json:"staticAddrss"`
	Bridge    string         `json:"branch_name"`
}

type staticAddress struct {
	Address     string   `json:"address"`
	Gateway     string   `json:"gateway"`
	Nameservers []string `json:"nameservers"`
}

type volume struct {
	ID       string `json:"id"`
	ReadOnly bool   `json:"is_read_only"`
	Source   struct {
		Container *struct {
			Image string `json:"image"`
		} `json:"container"`
		VirtioFS *struct {
			Path string `json:"path"`
		} `json:"virtiofs_source"`
	} `json:"source"`
	Partition  string `json:"partition_id"`
	Size       int64  `json:"size"`
	MountPoint string `json:"mount_point"`
}

type volumeStatus struct {
	Mount mount `json:"mount"`
}

type mount struct {
	Type   string `json:"type"`
	Source string `json:"source"`
}

type device struct {
	Name  string `json:"host_device_name"`
	Index int    `json:"index"`
	MAC   string `json:"mac_address"`
}

// Wrote says whether a blob with flintlock's labels is flintlock's: Ingot's, which
// has the same, says its format.
func Wrote(blob []byte) bool {
	var ours struct {
		Format json.RawMessage `json:"format"`
	}
	return json.Unmarshal(blob, &ours) != nil || ours.Format == nil
}

// Decode reads a record. One that is not understood as a whole is an error: whoever
// took half of it would run, or delete, another microVM.
func Decode(blob []byte) (Record, error) {
	var f record
	if err := json.Unmarshal(blob, &f); err != nil {
		return Record{}, err
	}
	place := strings.Split(f.ID, "/")
	if len(place) != 3 {
		return Record{}, fmt.Errorf("id %q is not NAMESPACE/NAME/UID", f.ID)
	}
	r := Record{
		Deleting: f.Status.State == "deleting",
		Spec: vm.Spec{
			Namespace: place[0], Name: place[1], UID: place[2], CreatedAt: time.Unix(f.Spec.CreatedAt, 0).UTC(),
			VCPU: f.Spec.VCPU, Memory: vm.MiB(f.Spec.Memory), Driver: cmp.Or(f.Spec.Provider, Firecracker),
			Kernel: vm.Kernel{
				File:    vm.File{Image: f.Spec.Kernel.Image, Path: f.Spec.Kernel.Path},
				Cmdline: f.Spec.Kernel.Cmdline, AddNetworkConfig: f.Spec.Kernel.AddNetworkConfig,
			},
			Root: f.Spec.Root.spec(), GuestAgent: f.Spec.GuestAgent,
		},
	}
	if f.Spec.Initrd != nil {
		r.Spec.Initrd = &vm.File{Image: f.Spec.Initrd.Image, Path: f.Spec.Initrd.Path}
	}
	for _, v := range f.Spec.Volumes {
		r.Spec.Volumes = append(r.Spec.Volumes, v.spec())
	}
	for key, value := range f.Spec.Metadata {
		if r.Spec.Metadata == nil {
			r.Spec.Metadata = map[string]string{}
		}
		r.Spec.Metadata[key] = text(value)
	}
	if r.Deleting && f.Spec.DeletedAt != 0 {
		r.DeletedAt = time.Unix(f.Spec.DeletedAt, 0).UTC()
	}
	var mistakes []error
	if !slices.Contains([]string{Firecracker, CloudHypervisor}, r.Spec.Driver) {
		mistakes = append(mistakes, fmt.Errorf("provider %q is not known", r.Spec.Driver))
	}
	if !slices.Contains([]string{"pending", "created", "failed", "deleting"}, f.Status.State) {
		mistakes = append(mistakes, fmt.Errorf("state %q is not known", f.Status.State))
	}
	for _, n := range f.Spec.Interfaces {
		card, err := n.spec()
		mistakes = append(mistakes, err)
		r.Spec.Interfaces = append(r.Spec.Interfaces, card)
	}
	var err error
	r.Things, err = f.things(place[2])
	mistakes = append(mistakes, err)
	if err := errors.Join(mistakes...); err != nil {
		return Record{}, err
	}
	r.Things.Unused = unused(blob, f)
	return r, nil
}

// text is a value of the metadata. Some clients have sent it bare.
func text(value string) string {
	if b, err := base64.StdEncoding.DecodeString(value); err == nil {
		return string(b)
	}
	return value
}

func (v volume) spec() vm.Volume {
	s := vm.Volume{ID: v.ID, ReadOnly: v.ReadOnly, MountPoint: v.MountPoint, Partition: v.Partition, Size: vm.MiB(v.Size)}
	if v.Source.Container != nil {
		s.Image = v.Source.Container.Image
	}
	if v.Source.VirtioFS != nil {
		s.VirtioFS = v.Source.VirtioFS.Path
	}
	return s
}

func (n networkCard) spec() (vm.Interface, error) {
	s := vm.Interface{ID: n.ID, Kind: vm.LinkKind(n.Type), MAC: n.MAC, Bridge: n.Bridge, Metadata: n.AllowMMDS}
	if s.Kind != vm.Tap && s.Kind != vm.Macvtap {
		return s, fmt.Errorf("interface %s: type %q is not known", n.ID, n.Type)
	}
	if n.Address == nil {
		return s, nil
	}
	var err error
	if s.Address, err = netip.ParsePrefix(n.Address.Address); err != nil {
		return s, fmt.Errorf("interface %s: address: %w", n.ID, err)
	}
	// It has a prefix length, which means nothing.
	if gateway, _, _ := strings.Cut(n.Address.Gateway, "/"); gateway != "" {
		if s.Gateway, err = netip.ParseAddr(gateway); err != nil {
			return s, fmt.Errorf("interface %s: gateway: %w", n.ID, err)
		}
	}
	for _, server := range n.Address.Nameservers {
		addr, err := netip.ParseAddr(server)
		if err != nil {
			return s, fmt.Errorf("interface %s: name server: %w", n.ID, err)
		}
		s.Nameservers = append(s.Nameservers, addr)
	}
	return s, nil
}

// deviceRule is what flintlock names taps. One of another name is none that it has
// made, and that may be removed with the microVM.
var deviceRule = regexp.MustCompile(`^fl(v)?tap[0-9a-f]{7}$`)

func (f record) things(uid string) (Things, error) {
	t := Things{Version: f.Version, Devices: map[string]string{}, Volumes: map[string]string{}}
	for id, d := range f.Status.Interfaces {
		if d.Name != "" && !deviceRule.MatchString(d.Name) {
			return t, fmt.Errorf("interface %s: device %q has a name that flintlock gives to none", id, d.Name)
		}
		if d.Name != "" {
			t.Devices[id] = d.Name
		}
	}
	for id, v := range f.Status.Volumes {
		t.Volumes[id] = v.Mount.Source
	}
	if m := f.Status.Kernel; m != nil && m.Source != "" {
		t.Kernel = filepath.Join(m.Source, f.Spec.Kernel.Path)
	}
	if m := f.Status.Initrd; m != nil && m.Source != "" && f.Spec.Initrd != nil {
		t.Initrd = filepath.Join(m.Source, f.Spec.Initrd.Path)
	}
	// From version 0.15.2 on it is in a directory of its own, which has the uid's name.
	dir := path.Dir(f.Status.VsockPath)
	if path.IsAbs(dir) && path.Base(dir) == uid && !strings.HasSuffix(dir, "/vm/"+f.ID) {
		t.Sockets = dir
	}
	return t, nil
}

// unused names the fields of a record that are not read: those of a later flintlock.
func unused(blob []byte, f record) []string {
	var all, read any
	known, err := json.Marshal(f)
	if err != nil || json.Unmarshal(blob, &all) != nil || json.Unmarshal(known, &read) != nil {
		return nil
	}
	return differ("", all, read)
}

func differ(at string, all, read any) []string {
	var names []string
	switch all := all.(type) {
	case map[string]any:
		known, _ := read.(map[string]any)
		for _, key := range slices.Sorted(maps.Keys(all)) {
			name := strings.TrimPrefix(at+"."+key, ".")
			if value, ok := field(known, key); ok {
				names = append(names, differ(name, all[key], value)...)
			} else if !empty(all[key]) {
				names = append(names, name)
			}
		}
	case []any:
		known, _ := read.([]any)
		for i := range min(len(all), len(known)) {
			names = append(names, differ(at+"["+strconv.Itoa(i)+"]", all[i], known[i])...)
		}
	}
	return names
}

// field finds a field as encoding/json does.
func field(all map[string]any, name string) (any, bool) {
	for key, value := range all {
		if strings.EqualFold(key, name) {
			return value, true
		}
	}
	return nil, false
}

// empty says whether a field that is not read says nothing.
func empty(value any) bool {
	switch v := value.(type) {
	case nil:
		return true
	case bool:
		return !v
	case float64:
		return v == 0
	case string:
		return v == ""
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	}
	return false
}
