// Package wire is where protobuf ends: it turns the API's messages into specs and
// statuses back into messages, errors into gRPC codes, and dials. It validates
// nothing that package vm can, and serves nothing.
package wire

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"ingot/api/types"
	"ingot/internal/vm"
)

// NotFound is the text with which flintlock's clients recognise a microVM that is
// not there.
const NotFound = "microvm spec %s not found"

// SpecFromProto reads a spec as flintlock's clients write it. The error has all that
// can't be read, each a *vm.FieldError.
func SpecFromProto(p *types.MicroVMSpec) (vm.Spec, error) {
	s := vm.Spec{
		UID: p.GetUid(), Namespace: p.GetNamespace(), Name: p.GetId(), Labels: maps.Clone(p.GetLabels()),
		VCPU: int(p.GetVcpu()), Memory: vm.MiB(p.GetMemoryInMb()), Driver: p.GetProvider(),
		Kernel: vm.Kernel{
			File:    vm.File{Image: image(p.GetKernel().GetImage()), Path: p.GetKernel().GetFilename()},
			Cmdline: maps.Clone(p.GetKernel().GetCmdline()), AddNetworkConfig: p.GetKernel().GetAddNetworkConfig(),
		},
		Root:       volumeFromProto(p.GetRootVolume()),
		GuestAgent: p.GetAllowGuestAgent(),
		Process: vm.Process{
			Entrypoint: p.GetProcess().GetEntrypoint(), Args: p.GetProcess().GetArgs(), Env: maps.Clone(p.GetProcess().GetEnv()),
			Dir: p.GetProcess().GetWorkingDir(), User: p.GetProcess().GetUser(),
			StopSignal: p.GetProcess().GetStopSignal(), Attach: p.GetProcess().GetAttach(),
		},
	}
	var mistakes []error
	switch p.GetRestartPolicy() {
	case types.RestartPolicy_ALWAYS:
	case types.RestartPolicy_ON_FAILURE:
		s.Restart = vm.RestartOnFailure
	case types.RestartPolicy_NEVER:
		s.Restart = vm.RestartNever
	default:
		mistakes = append(mistakes, &vm.FieldError{Field: "restart_policy", Problem: fmt.Sprintf("there is no policy %d", p.GetRestartPolicy())})
	}
	if c := p.GetCpuConfig(); len(c.GetFeaturesToEnable())+len(c.GetKvmCapabilitiesToDisable()) > 0 {
		mistakes = append(mistakes, &vm.FieldError{Field: "cpu_config", Problem: "cpu configuration not supported by the microvm provider"})
	}
	if p.Initrd != nil {
		s.Initrd = &vm.File{Image: image(p.Initrd.GetImage()), Path: p.Initrd.GetFilename()}
	}
	for _, v := range p.GetAdditionalVolumes() {
		s.Volumes = append(s.Volumes, volumeFromProto(v))
	}
	for i, n := range p.GetInterfaces() {
		iface, err := interfaceFromProto(fmt.Sprintf("interfaces[%d]", i), n)
		mistakes = append(mistakes, err...)
		s.Interfaces = append(s.Interfaces, iface)
	}
	allowed, err := Addresses("allowed_addresses", p.GetAllowedAddresses())
	s.AllowedAddresses = allowed
	mistakes = append(mistakes, err)
	for key, value := range p.GetMetadata() {
		if s.Metadata == nil {
			s.Metadata = map[string]string{}
		}
		s.Metadata[key] = decode(value)
	}
	if err := errors.Join(mistakes...); err != nil {
		return vm.Spec{}, err
	}
	return s, nil
}

// Addresses reads addresses and prefixes. The error has all that can't be read, each
// a *vm.FieldError.
func Addresses(field string, texts []string) (all []netip.Prefix, err error) {
	var mistakes []error
	for i, text := range texts {
		p, err := vm.ParseAddress(text)
		if err != nil {
			mistakes = append(mistakes, &vm.FieldError{Field: fmt.Sprintf("%s[%d]", field, i), Problem: err.Error()})
		}
		all = append(all, p)
	}
	return all, errors.Join(mistakes...)
}

// image drops what flintlock drops: white space and control characters.
func image(ref string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.TrimSpace(ref))
}

// decode reads a metadata value. Some clients send the bare text.
func decode(value string) string {
	if text, err := base64.StdEncoding.DecodeString(value); err == nil {
		return string(text)
	}
	return value
}

func volumeFromProto(v *types.Volume) vm.Volume {
	return vm.Volume{
		ID: v.GetId(), Image: image(v.GetSource().GetContainerSource()), VirtioFS: v.GetSource().GetVirtiofsSource(),
		ReadOnly: v.GetIsReadOnly(), MountPoint: v.GetMountPoint(), Partition: v.GetPartitionId(), Size: vm.MiB(v.GetSizeInMb()),
	}
}

func interfaceFromProto(field string, n *types.NetworkInterface) (i vm.Interface, mistakes []error) {
	wrong := func(what, format string, a ...any) {
		mistakes = append(mistakes, &vm.FieldError{Field: field + what, Problem: fmt.Sprintf(format, a...)})
	}
	i = vm.Interface{ID: n.GetDeviceId(), MAC: n.GetGuestMac(), Bridge: n.GetOverrides().GetBridgeName()}
	switch n.GetType() {
	case types.NetworkInterface_MACVTAP:
		i.Kind = vm.Macvtap
	case types.NetworkInterface_TAP:
		i.Kind = vm.Tap
	default:
		wrong(".type", "there is no type %d", n.GetType())
	}
	if n.GetAddress() == nil {
		return i, mistakes
	}
	var err error
	if i.Address, err = netip.ParsePrefix(n.Address.GetAddress()); err != nil {
		wrong(".address.address", "%q is not an address with a prefix length", n.Address.GetAddress())
	}
	if gateway := n.Address.GetGateway(); gateway != "" {
		if i.Gateway, err = parseGateway(gateway); err != nil {
			wrong(".address.gateway", "%q is not an address", gateway)
		}
	}
	for _, text := range n.Address.GetNameservers() {
		server, err := netip.ParseAddr(text)
		if err != nil {
			wrong(".address.nameservers", "%q is not an address", text)
		}
		i.Nameservers = append(i.Nameservers, server)
	}
	return i, mistakes
}

// parseGateway takes an address with a prefix length, which flintlock wants and drops,
// and one without.
func parseGateway(text string) (netip.Addr, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		return p.Addr(), nil
	}
	return netip.ParseAddr(text)
}

// ToProto writes a microVM for flintlock's clients, and for ours.
func ToProto(s vm.Spec, st vm.Status, dir string) *types.MicroVM {
	p := &types.MicroVM{Version: int32(st.Version), Spec: specToProto(s), Status: statusToProto(st, dir)}
	p.Spec.UpdatedAt, p.Spec.DeletedAt = stamp(st.UpdatedAt), stamp(st.DeletedAt)
	if driver := cmp.Or(s.Driver, st.Driver); driver != "" { // also the one that the host has chosen
		p.Spec.Provider = &driver
	}
	p.Status.Conditions = conditions(s, st)
	return p
}

// conditions are what is not as it was asked for.
func conditions(s vm.Spec, st vm.Status) (list []*types.Condition) {
	for _, n := range s.Interfaces {
		if n.Instead == vm.Macvtap {
			list = append(list, &types.Condition{
				Type: "NetworkAsRequested", Status: "False", Reason: "MacvtapUnavailable", Since: stamp(s.CreatedAt),
				Message: fmt.Sprintf("%s is a %s on bridge %s and not a %s: %s", n.ID, n.Kind, n.Bridge, n.Instead, n.Because),
			})
		}
	}
	if len(st.Refused) > 0 {
		first := st.Refused[0]
		c := &types.Condition{
			Type: "AddressesAllowed", Status: "False", Reason: "AddressRefused", Since: stamp(first.Since),
			Message: fmt.Sprintf("%s sends from %s (%d packets", first.Interface, first.Address, first.Packets),
		}
		for _, r := range st.Refused[1:] {
			c.Message += fmt.Sprintf("), %s from %s (%d", r.Interface, r.Address, r.Packets)
		}
		c.Message += "): dropped, since neither DHCP has given it nor allowed_addresses has it (`ingot vm allow`)"
		list = append(list, c)
	}
	return list
}

func specToProto(s vm.Spec) *types.MicroVMSpec {
	p := &types.MicroVMSpec{
		Id: s.Name, Namespace: s.Namespace, Labels: s.Labels, Vcpu: int32(s.VCPU), MemoryInMb: int32(s.Memory), Uid: &s.UID,
		Kernel: &types.Kernel{
			Image: s.Kernel.Image, Filename: &s.Kernel.Path, Cmdline: s.Kernel.Cmdline, AddNetworkConfig: s.Kernel.AddNetworkConfig,
		},
		RootVolume: volumeToProto(s.Root), AllowGuestAgent: s.GuestAgent, CreatedAt: stamp(s.CreatedAt),
	}
	if s.Initrd != nil {
		p.Initrd = &types.Initrd{Image: s.Initrd.Image, Filename: &s.Initrd.Path}
	}
	for _, v := range s.Volumes {
		p.AdditionalVolumes = append(p.AdditionalVolumes, volumeToProto(v))
	}
	for _, n := range s.Interfaces {
		p.Interfaces = append(p.Interfaces, interfaceToProto(n))
	}
	for key, value := range s.Metadata {
		if p.Metadata == nil {
			p.Metadata = map[string]string{}
		}
		p.Metadata[key] = base64.StdEncoding.EncodeToString([]byte(value))
	}
	for _, a := range s.AllowedAddresses {
		p.AllowedAddresses = append(p.AllowedAddresses, vm.AddressText(a))
	}
	policy := types.RestartPolicy_ALWAYS
	switch s.Restart {
	case vm.RestartOnFailure:
		policy = types.RestartPolicy_ON_FAILURE
	case vm.RestartNever:
		policy = types.RestartPolicy_NEVER
	}
	p.RestartPolicy = &policy
	if !s.Process.IsZero() {
		p.Process = &types.Process{
			Entrypoint: s.Process.Entrypoint, Args: s.Process.Args, Env: s.Process.Env, WorkingDir: s.Process.Dir,
			User: s.Process.User, StopSignal: s.Process.StopSignal, Attach: s.Process.Attach,
		}
	}
	return p
}

func volumeToProto(v vm.Volume) *types.Volume {
	p := &types.Volume{Id: v.ID, IsReadOnly: v.ReadOnly, Source: &types.VolumeSource{}, PartitionId: &v.Partition}
	size := int32(v.Size)
	p.SizeInMb = &size
	if v.Image != "" {
		p.Source.ContainerSource = &v.Image
	}
	if v.VirtioFS != "" {
		p.Source.VirtiofsSource = &v.VirtioFS
	}
	if v.MountPoint != "" {
		p.MountPoint = &v.MountPoint
	}
	return p
}

func interfaceToProto(n vm.Interface) *types.NetworkInterface {
	p := &types.NetworkInterface{DeviceId: n.ID, Type: types.NetworkInterface_MACVTAP, GuestMac: &n.MAC}
	if n.Kind == vm.Tap {
		p.Type = types.NetworkInterface_TAP
	}
	if n.Bridge != "" {
		p.Overrides = &types.NetworkOverrides{BridgeName: &n.Bridge}
	}
	if n.Address.IsValid() {
		p.Address = &types.StaticAddress{Address: n.Address.String()}
		if n.Gateway.IsValid() {
			gateway := netip.PrefixFrom(n.Gateway, n.Address.Bits()).String()
			p.Address.Gateway = &gateway
		}
		for _, a := range n.Nameservers {
			p.Address.Nameservers = append(p.Address.Nameservers, a.String())
		}
	}
	return p
}

// State is what flintlock's clients know of a phase. A microVM that was stopped
// is CREATED to them: its start has succeeded.
func State(p vm.Phase) types.MicroVMStatus_MicroVMState {
	switch p {
	case vm.Running, vm.Paused, vm.Stopping, vm.Stopped:
		return types.MicroVMStatus_CREATED
	case vm.Failed:
		return types.MicroVMStatus_FAILED
	case vm.Deleting:
		return types.MicroVMStatus_DELETING
	}
	return types.MicroVMStatus_PENDING
}

func statusToProto(st vm.Status, dir string) *types.MicroVMStatus {
	p := &types.MicroVMStatus{
		State: State(st.Phase), Retry: int32(st.Retry), Phase: string(st.Phase), Step: st.Step, Reason: st.Reason,
		Driver: st.Driver, Accelerator: st.Accelerator, Restarts: int32(st.Restarts), Pid: int32(st.PID),
		StartedAt: stamp(st.StartedAt), EndedAt: stamp(st.EndedAt), LastCrashAt: stamp(st.LastCrashAt), RetryAt: stamp(st.RetryAt),
		LastCrashReason: st.LastCrashReason, AgentReady: st.AgentReady, ExitCode: int32(st.ExitCode), Dir: dir,
	}
	if st.BootTime != 0 {
		p.BootTime = durationpb.New(st.BootTime)
	}
	for _, a := range st.Addresses {
		p.Addresses = append(p.Addresses, a.String())
	}
	if st.KernelPath != "" {
		p.KernelMount = &types.Mount{Type: types.Mount_HOSTPATH, Source: st.KernelPath}
	}
	if st.InitrdPath != "" {
		p.InitrdMount = &types.Mount{Type: types.Mount_HOSTPATH, Source: st.InitrdPath}
	}
	for id, path := range st.Volumes {
		if p.Volumes == nil {
			p.Volumes = map[string]*types.VolumeStatus{}
		}
		p.Volumes[id] = &types.VolumeStatus{
			Mount: &types.Mount{Type: types.Mount_DEV, Source: path}, SizeInMb: int64(st.VolumeSizes[id]),
		}
	}
	for id, l := range st.Links {
		if p.NetworkInterfaces == nil {
			p.NetworkInterfaces = map[string]*types.NetworkInterfaceStatus{}
		}
		p.NetworkInterfaces[id] = &types.NetworkInterfaceStatus{
			HostDeviceName: l.Device, Index: int32(l.Index), MacAddress: l.MAC, GuestMac: l.GuestMAC,
		}
	}
	return p
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
