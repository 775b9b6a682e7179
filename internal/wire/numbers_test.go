package wire_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "ingot/api/services/microvm/v1alpha1"
	_ "ingot/api/services/microvmexec/v1alpha1"
	_ "ingot/api/services/microvmsshproxy/v1alpha1"
)

// flintlock is its API, by name, number and kind, without what is from 1000 on. A
// star is repeated, a question mark optional.
const flintlock = `
flintlock.types.CPUConfig: 1 features_to_enable string* 2 kvm_capabilities_to_disable string*
flintlock.types.ContainerVolumeSource: 1 image string
flintlock.types.Initrd: 1 image string 2 filename string?
flintlock.types.Kernel: 1 image string 2 cmdline map<string,string> 3 filename string? 4 add_network_config bool
flintlock.types.MicroVM: 1 version int32 2 spec MicroVMSpec 3 status MicroVMStatus
flintlock.types.MicroVMSpec: 1 id string 2 namespace string 3 labels map<string,string> 4 vcpu int32 5 memory_in_mb int32 6 kernel Kernel 7 initrd Initrd? 8 root_volume Volume 9 additional_volumes Volume* 10 interfaces NetworkInterface* 11 metadata map<string,string> 12 created_at Timestamp 13 updated_at Timestamp 14 deleted_at Timestamp 15 uid string? 16 provider string? 17 allow_guest_agent bool 18 cpu_config CPUConfig?
flintlock.types.MicroVMStatus: 1 state MicroVMState 2 volumes map<string,VolumeStatus> 3 kernel_mount Mount 4 initrd_mount Mount 5 network_interfaces map<string,NetworkInterfaceStatus> 6 retry int32 7 vsock_path string
flintlock.types.MicroVMStatus.MicroVMState: PENDING 0 CREATED 1 FAILED 2 DELETING 3
flintlock.types.Mount: 1 type MountType 2 source string
flintlock.types.Mount.MountType: DEV 0 HOSTPATH 1
flintlock.types.NetworkInterface: 1 device_id string 2 type IfaceType 4 guest_mac string? 5 address StaticAddress? 6 overrides NetworkOverrides?
flintlock.types.NetworkInterface.IfaceType: MACVTAP 0 TAP 1
flintlock.types.NetworkInterfaceStatus: 1 host_device_name string 2 index int32 3 mac_address string
flintlock.types.NetworkOverrides: 1 bridge_name string?
flintlock.types.StaticAddress: 1 address string 2 gateway string? 3 nameservers string*
flintlock.types.VirtioFSVolumeSource: 1 path string
flintlock.types.Volume: 1 id string 2 is_read_only bool 3 mount_point string? 4 source VolumeSource 5 partition_id string? 6 size_in_mb int32?
flintlock.types.VolumeSource: 1 container_source string? 2 virtiofs_source string?
flintlock.types.VolumeStatus: 1 mount Mount
microvm.services.api.v1alpha1.CreateMicroVMRequest: 1 microvm MicroVMSpec 2 metadata map<string,Any>
microvm.services.api.v1alpha1.CreateMicroVMResponse: 1 microvm MicroVM
microvm.services.api.v1alpha1.DeleteMicroVMRequest: 1 uid string
microvm.services.api.v1alpha1.GetMicroVMRequest: 1 uid string
microvm.services.api.v1alpha1.GetMicroVMResponse: 1 microvm MicroVM
microvm.services.api.v1alpha1.GuestAgentServiceInfo: 1 enabled bool 2 address string
microvm.services.api.v1alpha1.ListMessage: 1 microvm MicroVM
microvm.services.api.v1alpha1.ListMicroVMsRequest: 1 namespace string 2 name string?
microvm.services.api.v1alpha1.ListMicroVMsResponse: 1 microvm MicroVM*
microvm.services.api.v1alpha1.MicroVM: CreateMicroVM(CreateMicroVMRequest) CreateMicroVMResponse DeleteMicroVM(DeleteMicroVMRequest) Empty GetMicroVM(GetMicroVMRequest) GetMicroVMResponse ListMicroVMs(ListMicroVMsRequest) ListMicroVMsResponse ListMicroVMsStream(ListMicroVMsRequest) stream ListMessage ServerInfo(Empty) ServerInfoResponse
microvm.services.api.v1alpha1.ServerInfoResponse: 1 version VersionInfo 2 uptime Duration 3 exec GuestAgentServiceInfo 4 ssh_proxy GuestAgentServiceInfo
microvm.services.api.v1alpha1.VersionInfo: 1 version string 2 build_date string 3 commit_hash string
microvmexec.services.api.v1alpha1.ExecCommandRequest: 1 start ExecStart 2 stdin bytes 3 stdin_eof bool
microvmexec.services.api.v1alpha1.ExecCommandResponse: 1 stdout bytes 2 stderr bytes 3 exit_code int32 4 error string
microvmexec.services.api.v1alpha1.ExecStart: 1 uid string 2 cmd string 3 args string* 4 cwd string 5 env map<string,string> 6 shell bool 7 user string 8 timeout_seconds int32 9 has_stdin bool
microvmexec.services.api.v1alpha1.MicroVMExec: ExecCommand(stream ExecCommandRequest) stream ExecCommandResponse
microvmsshproxy.services.api.v1alpha1.MicroVMSSHProxy: SSHProxy(stream SSHProxyRequest) stream SSHProxyResponse
microvmsshproxy.services.api.v1alpha1.SSHProxyRequest: 1 uid string 2 data bytes
microvmsshproxy.services.api.v1alpha1.SSHProxyResponse: 1 data bytes
`

// ours are whole messages of Ingot's in flintlock's package.
var ours = []string{"flintlock.types.RestartPolicy", "flintlock.types.Process", "flintlock.types.Condition"}

// TestNumbers: what flintlock's clients send means the same here.
func TestNumbers(t *testing.T) {
	var got []string
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if p := string(f.Package()); p == "flintlock.types" || strings.HasSuffix(p, ".services.api.v1alpha1") {
			got = append(got, services(f.Services())...)
			got = append(got, enums(f.Enums())...)
			got = append(got, messages(f.Messages())...)
		}
		return true
	})
	slices.Sort(got)
	want := strings.Split(strings.TrimSpace(flintlock), "\n")
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("missing: %s", line)
		}
	}
	for _, line := range got {
		if name, _, _ := strings.Cut(line, ":"); !slices.Contains(want, line) && !slices.Contains(ours, name) {
			t.Errorf("more:    %s", line)
		}
	}
}

func services(list protoreflect.ServiceDescriptors) (lines []string) {
	for i := range list.Len() {
		line := string(list.Get(i).FullName()) + ":"
		for j := range list.Get(i).Methods().Len() {
			m := list.Get(i).Methods().Get(j)
			stream := func(yes bool) string { return map[bool]string{true: "stream "}[yes] }
			line += fmt.Sprintf(" %s(%s%s) %s%s", m.Name(), stream(m.IsStreamingClient()), m.Input().Name(), stream(m.IsStreamingServer()), m.Output().Name())
		}
		lines = append(lines, line)
	}
	return lines
}

func enums(list protoreflect.EnumDescriptors) (lines []string) {
	for i := range list.Len() {
		line := string(list.Get(i).FullName()) + ":"
		for j := range list.Get(i).Values().Len() {
			v := list.Get(i).Values().Get(j)
			line += fmt.Sprintf(" %s %d", v.Name(), v.Number())
		}
		lines = append(lines, line)
	}
	return lines
}

func messages(list protoreflect.MessageDescriptors) (lines []string) {
	for i := range list.Len() {
		m := list.Get(i)
		if m.IsMapEntry() {
			continue
		}
		line := string(m.FullName()) + ":"
		for j := range m.Fields().Len() {
			if f := m.Fields().Get(j); f.Number() < 1000 {
				line += fmt.Sprintf(" %d %s %s", f.Number(), f.Name(), kind(f))
			}
		}
		lines = append(append(append(lines, line), messages(m.Messages())...), enums(m.Enums())...)
	}
	return lines
}

func kind(f protoreflect.FieldDescriptor) string {
	name := f.Kind().String()
	switch {
	case f.IsMap():
		return "map<" + kind(f.MapKey()) + "," + kind(f.MapValue()) + ">"
	case f.Message() != nil:
		name = string(f.Message().Name())
	case f.Enum() != nil:
		name = string(f.Enum().Name())
	}
	switch {
	case f.IsList():
		name += "*"
	case f.HasOptionalKeyword():
		name += "?"
	}
	return name
}
