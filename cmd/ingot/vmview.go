package main

import (
	"cmp"
	"maps"
	"net"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

// vmView is a microVM as `-o json` shows it. docs/json.md describes it.
type vmView struct {
	Namespace   string            `json:"namespace"`
	Name        string            `json:"name"`
	UID         string            `json:"uid"`
	Host        string            `json:"host"`
	State       string            `json:"state"`
	Step        string            `json:"step"`
	Reason      string            `json:"reason"`
	IP          string            `json:"ip"`
	Addresses   []string          `json:"addresses"`
	Driver      string            `json:"driver"`
	Accelerator string            `json:"accelerator"`
	Image       string            `json:"image"`
	Kernel      string            `json:"kernel"`
	VCPU        int32             `json:"vcpu"`
	MemoryMB    int32             `json:"memory_mb"`
	Disks       []diskView        `json:"disks"` // the root first
	Labels      map[string]string `json:"labels"`
	Interfaces  []interfaceView   `json:"interfaces"`
	Allowed     []string          `json:"allowed_addresses"`
	PID         int32             `json:"pid"`
	Dir         string            `json:"dir"`
	Agent       bool              `json:"agent"`
	Restarts    int32             `json:"restarts"`
	ExitCode    int32             `json:"exit_code"`
	Created     *time.Time        `json:"created"`
	Started     *time.Time        `json:"started"`
	Ended       *time.Time        `json:"ended"`
	LastCrash   *crashView        `json:"last_crash"`
	Conditions  []conditionView   `json:"conditions"`
}

// conditionView is something that is not as it was asked for.
type conditionView struct {
	Type    string     `json:"type"`
	Status  string     `json:"status"`
	Reason  string     `json:"reason"`
	Message string     `json:"message"`
	Since   *time.Time `json:"since"`
}

type diskView struct {
	ID     string `json:"id"`
	SizeMB int64  `json:"size_mb"`
}

type interfaceView struct {
	ID     string `json:"id"`
	Device string `json:"device"` // on the host
	MAC    string `json:"mac"`    // in the guest
}

type crashView struct {
	At     *time.Time `json:"at"`
	Reason string     `json:"reason"`
}

func view(vm microVM, leases map[string]*ingotv1.Lease) vmView {
	spec, st := vm.GetSpec(), vm.GetStatus()
	v := vmView{
		Namespace: spec.GetNamespace(), Name: spec.GetId(), UID: spec.GetUid(), Host: vm.host.Name,
		State: state(st), Step: st.GetStep(), Reason: st.GetReason(),
		IP: address(vm.MicroVM, leases), Addresses: append([]string{}, st.GetAddresses()...),
		Driver: cmp.Or(st.GetDriver(), spec.GetProvider()), Accelerator: st.GetAccelerator(),
		Image: spec.GetRootVolume().GetSource().GetContainerSource(), Kernel: spec.GetKernel().GetImage(),
		VCPU: spec.GetVcpu(), MemoryMB: spec.GetMemoryInMb(), Labels: spec.GetLabels(), Interfaces: []interfaceView{}, Allowed: append([]string{}, spec.GetAllowedAddresses()...), Conditions: []conditionView{},
		PID: st.GetPid(), Dir: st.GetDir(), Agent: st.GetAgentReady(), Restarts: st.GetRestarts(), ExitCode: st.GetExitCode(),
		Created: when(spec.GetCreatedAt()), Started: when(st.GetStartedAt()), Ended: when(st.GetEndedAt()),
	}
	for _, d := range append([]*types.Volume{spec.GetRootVolume()}, spec.GetAdditionalVolumes()...) {
		v.Disks = append(v.Disks, diskView{d.GetId(), st.GetVolumes()[d.GetId()].GetSizeInMb()})
	}
	if v.Labels == nil {
		v.Labels = map[string]string{}
	}
	if at := when(st.GetLastCrashAt()); at != nil {
		v.LastCrash = &crashView{at, st.GetLastCrashReason()}
	}
	for _, c := range st.GetConditions() {
		v.Conditions = append(v.Conditions, conditionView{c.GetType(), c.GetStatus(), c.GetReason(), c.GetMessage(), when(c.GetSince())})
	}
	for _, id := range slices.Sorted(maps.Keys(st.GetNetworkInterfaces())) {
		i := st.GetNetworkInterfaces()[id]
		v.Interfaces = append(v.Interfaces, interfaceView{id, i.GetHostDeviceName(), i.GetGuestMac()})
	}
	return v
}

func when(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// state is the phase; a host without one (flintlock's own) has only the state.
func state(st *types.MicroVMStatus) string {
	if st.GetPhase() != "" {
		return st.GetPhase()
	}
	return map[types.MicroVMStatus_MicroVMState]string{
		types.MicroVMStatus_PENDING:  "pending",
		types.MicroVMStatus_CREATED:  "running",
		types.MicroVMStatus_FAILED:   "failed",
		types.MicroVMStatus_DELETING: "deleting",
	}[st.GetState()]
}

// address is what the guest's agent says it has, else what the hub gave to one
// of its MAC addresses.
func address(vm *types.MicroVM, leases map[string]*ingotv1.Lease) string {
	if a := vm.GetStatus().GetAddresses(); len(a) > 0 {
		return a[0]
	}
	if state(vm.GetStatus()) != "running" {
		return "" // its lease may still be there, but nobody uses it
	}
	for _, i := range vm.GetStatus().GetNetworkInterfaces() {
		if mac, err := net.ParseMAC(i.GetGuestMac()); err == nil && leases[mac.String()] != nil {
			return leases[mac.String()].GetIp()
		}
	}
	return ""
}
