package flintlock

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ingot/internal/vm"
)

const uid = "01JA1B2C3D4E5F6G7H8J9KMNPQ"

// full is a record with every field that flintlock 0.11 writes, in its spelling.
var full = `{
 "id": "team/web/` + uid + `", "version": 7,
 "spec": {
  "provider": "cloudhypervisor",
  "kernel": {"image": "ghcr.io/x/kernel:6.1", "Filename": "boot/vmlinux", "cmdline": {"quiet": "", "a": "b"}, "add_network_config": true},
  "initrd": {"image": "ghcr.io/x/initrd:1", "Filename": "initrd.img"},
  "vcpu": 4, "memory_inmb": 2048,
  "network_interfaces": [
   {"guest_device_name": "eth0", "allow_mmds": true, "guest_mac": "AA:FF:00:00:00:01", "type": "tap",
    "staticAddrss": {"address": "169.254.0.1/16"}},
   {"guest_device_name": "eth1", "guest_mac": "02:00:00:00:00:07", "type": "macvtap",
    "staticAddrss": {"address": "10.0.0.5/24", "gateway": "10.0.0.1/24", "nameservers": ["1.1.1.1", "2606:4700::1"]}},
   {"guest_device_name": "eth2", "type": "tap", "branch_name": "br9"}
  ],
  "root_volume": {"id": "root", "is_read_only": false, "source": {"container": {"image": "ghcr.io/x/os:1"}}, "partition_id": "2", "size": 100},
  "additional_volumes": [
   {"id": "modules", "is_read_only": true, "source": {"container": {"image": "ghcr.io/x/modules:1"}}, "mount_point": "/lib/modules"},
   {"id": "shared", "source": {"virtiofs_source": {"path": "/srv"}}}
  ],
  "metadata": {"user-data": "` + base64.StdEncoding.EncodeToString([]byte("#cloud-config\n")) + `", "bare": "no base64!"},
  "allow_guest_agent": true, "created_at": 1784455200, "updated_at": 1784455201, "deleted_at": 0
 },
 "status": {
  "state": "created",
  "volumes": {"root": {"mount": {"type": "dev", "source": "/dev/mapper/pool-snap-3"}}, "modules": {"mount": {"type": "dev", "source": "/dev/mapper/pool-snap-6"}},
   "shared": {"mount": {"type": "hostpath", "source": "/x/virtiofs.sock"}}},
  "kernel_mount": {"type": "hostpath", "source": "/c/snapshots/5"}, "initrd_mount": {"type": "hostpath", "source": "/c/snapshots/6"},
  "network_interfaces": {"eth0": {"host_device_name": "fltap1a2b3c4", "index": 7, "mac_address": "AA:BB:CC:DD:EE:FF"},
   "eth1": {"host_device_name": "flvtap5d6e7f8", "index": 8, "mac_address": "02:00:00:00:00:07"}},
  "retry": 0, "not_before": 0, "vsock_path": "/run/flintlock/` + uid + `/guest-agent.vsock"
 }
}`

func TestDecode(t *testing.T) {
	got, err := Decode([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	want := Record{
		Spec: vm.Spec{
			UID: uid, Namespace: "team", Name: "web", CreatedAt: time.Unix(1784455200, 0).UTC(),
			VCPU: 4, Memory: 2048, Driver: CloudHypervisor, GuestAgent: true,
			Kernel: vm.Kernel{
				File:    vm.File{Image: "ghcr.io/x/kernel:6.1", Path: "boot/vmlinux"},
				Cmdline: map[string]string{"quiet": "", "a": "b"}, AddNetworkConfig: true,
			},
			Initrd: &vm.File{Image: "ghcr.io/x/initrd:1", Path: "initrd.img"},
			Root:   vm.Volume{ID: "root", Image: "ghcr.io/x/os:1", Partition: "2", Size: 100},
			Volumes: []vm.Volume{
				{ID: "modules", Image: "ghcr.io/x/modules:1", ReadOnly: true, MountPoint: "/lib/modules"},
				{ID: "shared", VirtioFS: "/srv"},
			},
			Interfaces: []vm.Interface{
				{ID: "eth0", Kind: vm.Tap, MAC: "AA:FF:00:00:00:01", Address: netip.MustParsePrefix("169.254.0.1/16"), Metadata: true},
				{
					ID: "eth1", Kind: vm.Macvtap, MAC: "02:00:00:00:00:07", Address: netip.MustParsePrefix("10.0.0.5/24"),
					Gateway: netip.MustParseAddr("10.0.0.1"), Nameservers: []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("2606:4700::1")},
				},
				{ID: "eth2", Kind: vm.Tap, Bridge: "br9"},
			},
			Metadata: map[string]string{"user-data": "#cloud-config\n", "bare": "no base64!"},
		},
		Things: Things{
			Version: 7, Kernel: "/c/snapshots/5/boot/vmlinux", Initrd: "/c/snapshots/6/initrd.img", Sockets: "/run/flintlock/" + uid,
			Devices: map[string]string{"eth0": "fltap1a2b3c4", "eth1": "flvtap5d6e7f8"},
			Volumes: map[string]string{"root": "/dev/mapper/pool-snap-3", "modules": "/dev/mapper/pool-snap-6", "shared": "/x/virtiofs.sock"},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Error(diff)
	}
	if !Wrote([]byte(full)) || Wrote([]byte(`{"format": 1, "spec": {}}`)) || !Wrote([]byte("torn")) {
		t.Error("ours and flintlock's are not told apart")
	}
}

func TestDecodeVariants(t *testing.T) {
	for name, c := range map[string]struct {
		old, new string
		check    func(Record) bool
	}{
		"no provider, as of old":    {`"provider": "cloudhypervisor",`, "", func(r Record) bool { return r.Spec.Driver == Firecracker }},
		"a delete under way":        {`"created"`, `"deleting"`, func(r Record) bool { return r.Deleting }},
		"a socket in its directory": {"/run/flintlock/" + uid, "/var/lib/flintlock/vm/team/web/" + uid, func(r Record) bool { return r.Things.Sockets == "" }},
		"a socket elsewhere":        {"/run/flintlock/" + uid, "/etc", func(r Record) bool { return r.Things.Sockets == "" }},
		"fields of a later version": {`"vcpu": 4`, `"cpu_config": {"features": ["x"]}, "later": 0, "vcpu": 4`, func(r Record) bool { return cmp.Equal(r.Things.Unused, []string{"spec.cpu_config"}) }},
		"a later field of a volume": {`"size": 100`, `"size": 100, "cache": "none"`, func(r Record) bool { return cmp.Equal(r.Things.Unused, []string{"spec.root_volume.cache"}) }},
		"no device yet":             {`"host_device_name": "fltap1a2b3c4"`, `"host_device_name": ""`, func(r Record) bool { return len(r.Things.Devices) == 1 }},
	} {
		text := strings.Replace(full, c.old, c.new, 1)
		if text == full {
			t.Fatalf("%s: nothing changed", name)
		}
		r, err := Decode([]byte(text))
		if err != nil || !c.check(r) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"a hypervisor that nobody knows": {`"cloudhypervisor"`, `"bhyve"`, "bhyve"},
		"a state that nobody knows":      {`"created"`, `"paused"`, "paused"},
		"an id of two parts":             {"team/web/", "web/", "NAMESPACE/NAME/UID"},
		"a card of another kind":         {`"macvtap"`, `"sriov"`, "sriov"},
		"an address without length":      {"10.0.0.5/24", "10.0.0.5", "address"},
		"a gateway that is none":         {"10.0.0.1/24", "gw", "gateway"},
		"somebody else's device":         {"fltap1a2b3c4", "bond0", "bond0"},
		"a device by way of a path":      {"fltap1a2b3c4", "fltap../../", "fltap"},
		"torn":                           {`"status"`, `"sta`, "invalid"},
	} {
		text := strings.Replace(full, c.old, c.new, 1)
		if text == full {
			t.Fatalf("%s: nothing changed", name)
		}
		if r, err := Decode([]byte(text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

func TestCompleteFromFirecracker(t *testing.T) {
	dir := t.TempDir()
	cfg := `{"network-interfaces": [{"iface_id": "eth0", "host_dev_name": "fltap1111111"}, {"iface_id": "eth1", "host_dev_name": "fltap2222222"}, {"iface_id": "eth2", "host_dev_name": "bond0"}]}`
	if err := os.WriteFile(filepath.Join(dir, "firecracker.cfg"), []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	things := Things{Devices: map[string]string{"eth0": "fltap0000000"}}
	things.Complete(dir)
	if diff := cmp.Diff(map[string]string{"eth0": "fltap0000000", "eth1": "fltap2222222"}, things.Devices); diff != "" {
		t.Error(diff)
	}
}

// Only sockets are removed with a directory that a record names.
func TestClearLeavesFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), uid)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (Things{Sockets: dir}).Clear(t.TempDir()); err != nil { // the microVM can be deleted all the same
		t.Error(err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
	os.Remove(precious)
	if err := (Things{Sockets: dir}).Clear(t.TempDir()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it is still there")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(fmt.Sprintf(`{"id": "a/b/%s", "spec": {}, "status": {"state": "pending"}}`, uid)))
	f.Add([]byte(`{"spec": null, "status": {"network_interfaces": {"": {}}}}`))
	f.Fuzz(func(t *testing.T, blob []byte) {
		r, err := Decode(blob)
		if err != nil {
			return
		}
		for _, name := range r.Things.Devices {
			if !deviceRule.MatchString(name) {
				t.Errorf("device %q", name)
			}
		}
	})
}
