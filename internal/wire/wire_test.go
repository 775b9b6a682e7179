package wire_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"

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
