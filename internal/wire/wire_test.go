package wire_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"ingot/api/types"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// FuzzSpec: no message makes the decoder panic, and a valid spec comes back as
// it was from the message that shows it.
func FuzzSpec(f *testing.F) {
	source, file := "busybox", "boot/vmlinux"
	for _, s := range []*types.MicroVMSpec{
		{},
		{Id: "one", Namespace: "ns", Vcpu: 1, MemoryInMb: 128, Kernel: &types.Kernel{Image: "kernel", Filename: &file},
			RootVolume: &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &source}},
			Interfaces: []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP}}},
		{Id: "two", Namespace: "ns", Vcpu: 1, MemoryInMb: 128, Kernel: &types.Kernel{Image: "kernel", Cmdline: map[string]string{"a": "b"}},
			RootVolume:        &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &source}},
			AdditionalVolumes: []*types.Volume{{Id: "data", IsReadOnly: true}, nil},
			Interfaces:        []*types.NetworkInterface{{DeviceId: "eth1", Address: &types.StaticAddress{Address: "10.0.0.2/24"}}, nil},
			Metadata:          map[string]string{"user-data": "I2Nsb3VkLWNvbmZpZw==", "odd": "%"}},
		{Id: "three", RestartPolicy: ptr(types.RestartPolicy(9)), CpuConfig: &types.CPUConfig{FeaturesToEnable: []string{"x"}},
			Process:    &types.Process{Args: []string{"a"}, Env: map[string]string{"A": "b"}},
			RootVolume: &types.Volume{Source: &types.VolumeSource{ContainerSource: &source, VirtiofsSource: &source}},
			Interfaces: []*types.NetworkInterface{
				{DeviceId: "eth1", Type: 9, Overrides: &types.NetworkOverrides{}},
				{DeviceId: "eth2", Address: &types.StaticAddress{Address: "fd00::2/64", Gateway: ptr("fe80::1%eth0/64"), Nameservers: []string{"fe80::1%\n"}}}},
			Metadata: map[string]string{"meta-data": "aW5zdGFuY2VfaWQ6ICZhIFsqYV0K"}},
	} {
		b, err := proto.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var p types.MicroVMSpec
		if proto.Unmarshal(data, &p) != nil {
			return
		}
		s, err := wire.SpecFromProto(&p)
		if err != nil {
			return
		}
		s.Normalize()
		if s.Validate() != nil {
			return
		}
		again, err := wire.SpecFromProto(wire.ToProto(s, vm.Status{}, "").Spec)
		if err != nil {
			t.Fatalf("shown and read again: %v", err)
		}
		again.Normalize()
		// What is shown of metadata is encoded, and reads as itself.
		if diff := cmp.Diff(s, again, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.IgnoreFields(vm.Spec{}, "Metadata", "CreatedAt")); diff != "" {
			t.Error(diff)
		}
	})
}

// TestMistakes: what no spec can hold is refused by its field, and all of it at once.
func TestMistakes(t *testing.T) {
	gateway, zero := "10.0.0.1/abc", "00:00:00:00:00:00"
	source, file := "busybox", "boot/vmlinux"
	p := &types.MicroVMSpec{
		Id: "one", RestartPolicy: ptr(types.RestartPolicy(7)), CpuConfig: &types.CPUConfig{FeaturesToEnable: []string{"avx512f"}},
		Kernel:     &types.Kernel{Image: "kernel", Filename: &file},
		RootVolume: &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &source}},
		Interfaces: []*types.NetworkInterface{
			{DeviceId: "eth1", Type: 7},
			{DeviceId: "eth2", Address: &types.StaticAddress{Address: "10.0.0.2", Gateway: &gateway, Nameservers: []string{"dns"}}},
			// flintlock's handler ends with its process on this one.
			{DeviceId: "eth3", Overrides: &types.NetworkOverrides{}, GuestMac: &zero},
		},
		AllowedAddresses: []string{"10.0.0.1", "10.0.0.1/33"},
	}
	_, err := wire.SpecFromProto(p)
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("not an invalid argument: %v", err)
	}
	for _, field := range []string{
		"restart_policy", "cpu_config", "interfaces[0].type", "interfaces[1].address.address", "interfaces[1].address.gateway", "interfaces[1].address.nameservers", "allowed_addresses[1]",
	} {
		if !strings.Contains(err.Error(), field+": ") {
			t.Errorf("%s is not in %v", field, err)
		}
	}
	p.RestartPolicy, p.CpuConfig, p.Interfaces, p.AllowedAddresses = nil, nil, p.Interfaces[2:], nil
	s, err := wire.SpecFromProto(p)
	if err != nil {
		t.Fatal(err)
	}
	s.Normalize()
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "interfaces[0].guest_mac: ") {
		t.Errorf("got %v", err)
	}
	p.Interfaces[0].GuestMac, p.Kernel = nil, nil // the one that ends flintlock's daemon for good
	if s, err = wire.SpecFromProto(p); err != nil {
		t.Fatal(err)
	}
	s.Normalize()
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "kernel.image: ") || !strings.Contains(err.Error(), "kernel.filename: ") {
		t.Errorf("got %v", err)
	}
}

func ptr[T any](v T) *T { return &v }

// TestState: flintlock's clients know four states, and go on from CREATED alone.
func TestState(t *testing.T) {
	for phase, want := range map[vm.Phase]types.MicroVMStatus_MicroVMState{
		vm.Pending: types.MicroVMStatus_PENDING, vm.Starting: types.MicroVMStatus_PENDING, vm.Running: types.MicroVMStatus_CREATED,
		vm.Paused: types.MicroVMStatus_CREATED, vm.Stopping: types.MicroVMStatus_CREATED, vm.Stopped: types.MicroVMStatus_CREATED,
		vm.Failed: types.MicroVMStatus_FAILED, vm.Deleting: types.MicroVMStatus_DELETING,
	} {
		if got := wire.State(phase); got != want {
			t.Errorf("%s: %v, want %v", phase, got, want)
		}
	}
}

// TestShown: what flintlock takes and does not give back comes back here, and what is
// not as it was asked for is said.
func TestShown(t *testing.T) {
	mount, bridge := "/data", "br1"
	source := "busybox"
	s, err := wire.SpecFromProto(&types.MicroVMSpec{
		Id: "one", Labels: map[string]string{"a": "b"}, AllowedAddresses: []string{"192.168.10.25/32", "10.42.0.0/16"},
		AdditionalVolumes: []*types.Volume{{Id: "data", MountPoint: &mount, Source: &types.VolumeSource{ContainerSource: &source}}},
		Interfaces:        []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP, Overrides: &types.NetworkOverrides{BridgeName: &bridge}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 7, 19, 12, 0, 0, 0, time.UTC)
	s.UID, s.CreatedAt = "01K0000000000000000000000A", at
	s.Interfaces = append(s.Interfaces, vm.Interface{ID: "eth2", Kind: vm.Tap, Bridge: "br0", Instead: vm.Macvtap, Because: "the host has no parent-iface"})
	p := wire.ToProto(s, vm.Status{Phase: vm.Deleting, Driver: "qemu", UpdatedAt: at.Add(time.Second), DeletedAt: at.Add(time.Minute), Refused: []vm.Refusal{
		{Interface: "eth1", Address: netip.MustParseAddr("10.0.0.7"), Packets: 3, Since: at}, {Interface: "eth2", Address: netip.MustParseAddr("fe80::7"), Packets: 1, Since: at},
	}}, "")
	want := &types.MicroVM{
		Spec: &types.MicroVMSpec{
			Id: "one", Uid: &s.UID, Labels: map[string]string{"a": "b"}, Provider: ptr("qemu"), RestartPolicy: ptr(types.RestartPolicy_ALWAYS),
			AllowedAddresses: []string{"192.168.10.25", "10.42.0.0/16"},
			CreatedAt:        timestamppb.New(at), UpdatedAt: timestamppb.New(at.Add(time.Second)), DeletedAt: timestamppb.New(at.Add(time.Minute)),
			Kernel: &types.Kernel{Filename: ptr("")}, RootVolume: &types.Volume{Source: &types.VolumeSource{}, PartitionId: ptr(""), SizeInMb: ptr(int32(0))},
			AdditionalVolumes: []*types.Volume{{
				Id: "data", MountPoint: &mount, Source: &types.VolumeSource{ContainerSource: &source}, PartitionId: ptr(""), SizeInMb: ptr(int32(0)),
			}},
			Interfaces: []*types.NetworkInterface{
				{DeviceId: "eth1", Type: types.NetworkInterface_TAP, GuestMac: ptr(""), Overrides: &types.NetworkOverrides{BridgeName: &bridge}},
				{DeviceId: "eth2", Type: types.NetworkInterface_TAP, GuestMac: ptr(""), Overrides: &types.NetworkOverrides{BridgeName: ptr("br0")}},
			},
		},
		Status: &types.MicroVMStatus{
			State: types.MicroVMStatus_DELETING, Phase: "deleting", Driver: "qemu",
			Conditions: []*types.Condition{{
				Type: "NetworkAsRequested", Status: "False", Reason: "MacvtapUnavailable", Since: timestamppb.New(at),
				Message: "eth2 is a tap on bridge br0 and not a macvtap: the host has no parent-iface",
			}, {
				Type: "AddressesAllowed", Status: "False", Reason: "AddressRefused", Since: timestamppb.New(at),
				Message: "eth1 sends from 10.0.0.7 (3 packets), eth2 from fe80::7 (1): dropped, since neither DHCP has given it nor allowed_addresses has it (`ingot vm allow`)",
			}},
		},
	}
	if diff := cmp.Diff(want, p, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}
