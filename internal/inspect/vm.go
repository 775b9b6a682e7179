package inspect

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

const (
	// crashFresh is how long a crash that was made good is still told.
	crashFresh = 10 * time.Minute
	// pingPatience is how long an echo may take.
	pingPatience = 2 * time.Second
	// metadataMAC is the guest's end of the metadata interface, in every microVM.
	metadataMAC = "aa:ff:00:00:00:01"
)

// logFiles are the files of a microVM that its host serves.
var logFiles = []string{"stdout", "stderr", "log", "metrics"}

func (s *survey) awaited(vm *types.MicroVM) bool {
	return s.env.Awaited == nil || s.env.Awaited(vmName(vm))
}

func phase(vm *types.MicroVM) string { return vm.GetStatus().GetPhase() }

func (s *survey) vmSteps(h *hostSurvey) []step {
	vms, _ := h.list()
	vms = slices.SortedFunc(slices.Values(vms), func(a, b *types.MicroVM) int { return cmp.Compare(vmName(a), vmName(b)) })
	steps := make([]step, len(vms))
	for i, vm := range vms {
		steps[i] = s.vmStep(h, vm)
	}
	return steps
}

func vmName(vm *types.MicroVM) string {
	return vm.GetSpec().GetNamespace() + "/" + vm.GetSpec().GetId()
}

func (s *survey) vmStep(h *hostSurvey, vm *types.MicroVM) step {
	var address netip.Addr // set by the check of the lease, above the ping
	return step{
		name:  vmName(vm),
		mild:  !s.awaited(vm),
		check: func(context.Context) finding { return checkState(vm, time.Now()) },
		children: []step{
			{name: "process", check: func(context.Context) finding { return checkProcess(vm, time.Now()) }},
			{name: "files", check: func(ctx context.Context) finding { return h.checkFiles(ctx, vm) }},
			{name: "interfaces", check: func(context.Context) finding { return h.checkLinks(vm) }},
			{name: "lease", check: func(context.Context) (found finding) {
				address, found = s.checkLease(vm)
				return found
			}, children: []step{
				{name: "ping", check: func(ctx context.Context) finding { return s.checkPing(ctx, address) }},
			}},
			{name: "agent", check: func(ctx context.Context) finding { return h.checkAgent(ctx, vm) }},
		},
	}
}

// checkState passes for a microVM that runs, and for one that nobody wants to run.
func checkState(vm *types.MicroVM, now time.Time) finding {
	st := vm.GetStatus()
	notes := []string{
		"uid: " + vm.GetSpec().GetUid(), "directory: " + st.GetDir(), "image: " + vm.GetSpec().GetRootVolume().GetSource().GetContainerSource(),
		fmt.Sprintf("kernel: %s %s", vm.GetSpec().GetKernel().GetImage(), vm.GetSpec().GetKernel().GetFilename()),
		fmt.Sprintf("%d vCPUs, %d MiB", vm.GetSpec().GetVcpu(), vm.GetSpec().GetMemoryInMb()),
	}
	for _, id := range slices.Sorted(maps.Keys(st.GetVolumes())) {
		notes = append(notes, fmt.Sprintf("disk %s: %d MiB", id, st.GetVolumes()[id].GetSizeInMb()))
	}
	switch phase(vm) {
	case "running":
		found := pass(fmt.Sprintf("running for %s, booted in %s", since(st, now), fmt.Sprintf("%.1fs", st.GetBootTime().AsDuration().Seconds())), notes...)
		if st.GetBootTime() == nil {
			found.detail = "running for " + since(st, now)
		}
		return found
	case "stopped":
		found := pass("stopped", notes...)
		if st.GetReason() != "" {
			found.detail += ": " + st.GetReason()
		}
		found.bar = "stopped"
		return found
	case "paused":
		found := pass("paused", notes...)
		found.bar = "paused"
		return found
	}
	detail := phase(vm)
	if st.GetStep() != "" {
		detail += " (" + st.GetStep() + ")"
	}
	for _, why := range []string{st.GetReason(), crash(st, now)} {
		if why != "" {
			detail += ": " + why
		}
	}
	if st.GetRetryAt() != nil {
		detail += fmt.Sprintf("; next try in %s", age(max(0, st.GetRetryAt().AsTime().Sub(now))))
	}
	return fail(detail)
}

func since(st *types.MicroVMStatus, now time.Time) string {
	if st.GetStartedAt() == nil {
		return "an unknown time"
	}
	return age(max(0, now.Sub(st.GetStartedAt().AsTime())))
}

// crash tells of a crash that is not long ago.
func crash(st *types.MicroVMStatus, now time.Time) string {
	if st.GetLastCrashAt() == nil || now.Sub(st.GetLastCrashAt().AsTime()) >= crashFresh {
		return ""
	}
	return fmt.Sprintf("it crashed %s ago (%s)", age(max(0, now.Sub(st.GetLastCrashAt().AsTime()))), cmp.Or(st.GetLastCrashReason(), "unknown reason"))
}

func checkProcess(vm *types.MicroVM, now time.Time) finding {
	st := vm.GetStatus()
	if st.GetPid() == 0 {
		return fail(fmt.Sprintf("there is no %s process", cmp.Or(st.GetDriver(), "hypervisor")))
	}
	detail := fmt.Sprintf("%s with %s, process %d", st.GetDriver(), st.GetAccelerator(), st.GetPid())
	if why := crash(st, now); why != "" {
		return warn(fmt.Sprintf("%s and was started again, %s in all; now %s", why, count(int(st.GetRestarts()), "restart", "restarts"), detail))
	}
	return pass(detail)
}

// checkFiles reads the end of each of the files that the host serves.
func (h *hostSurvey) checkFiles(ctx context.Context, vm *types.MicroVM) finding {
	steps := make([]step, len(logFiles))
	for i, file := range logFiles {
		steps[i] = step{name: vm.GetStatus().GetDriver() + "." + file, check: func(ctx context.Context) finding {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			stream, err := h.client.Logs(ctx, &v1.LogsRequest{Uid: vm.GetSpec().GetUid(), TailBytes: 1, File: file})
			for err == nil {
				_, err = stream.Recv()
			}
			if err != io.EOF {
				return fail(said(err))
			}
			return pass("")
		}}
	}
	var names []string
	for _, c := range all(ctx, steps) {
		if c.Status == Fail {
			return fail(c.Name + ": " + c.Detail)
		}
		names = append(names, c.Name)
	}
	return pass(strings.Join(names, ", "), "directory: "+vm.GetStatus().GetDir())
}

// checkLinks looks for the devices that the microVM was given.
func (h *hostSurvey) checkLinks(vm *types.MicroVM) finding {
	f, _ := h.facts()
	links := vm.GetStatus().GetNetworkInterfaces()
	var shown []string
	for _, id := range slices.Sorted(maps.Keys(links)) {
		name := links[id].GetHostDeviceName()
		i := slices.IndexFunc(f.GetInterfaces(), func(i *v1.InterfaceFacts) bool { return i.GetName() == name })
		switch {
		case i < 0:
			return fail(fmt.Sprintf("%s: its device %s is gone", id, name))
		case !f.GetInterfaces()[i].GetUp():
			return fail(fmt.Sprintf("%s: its device %s is down", id, name))
		}
		on := ""
		if master := f.GetInterfaces()[i].GetMaster(); master != "" {
			on = " on " + master
		}
		shown = append(shown, fmt.Sprintf("%s is %s%s", id, name, on))
	}
	if len(shown) == 0 {
		return fail("there are none")
	}
	for _, c := range vm.GetStatus().GetConditions() {
		if c.GetType() == "AddressesAllowed" && c.GetStatus() == "False" {
			return warn(c.GetMessage())
		}
	}
	return pass(strings.Join(shown, ", "))
}

// checkLease joins the microVM and the hub by MAC address, the only thing that
// both know.
func (s *survey) checkLease(vm *types.MicroVM) (netip.Addr, finding) {
	mac := segmentMAC(vm)
	if mac == "" {
		return netip.Addr{}, skip("no interface on the segment")
	}
	if a := staticAddress(vm); a.IsValid() {
		return a, pass("none: the address " + a.String() + " is in its spec")
	}
	if _, err := s.hub.facts(); err != nil {
		return netip.Addr{}, skip(s.hub.Name + " failed")
	}
	l, err := s.hub.lease(mac)
	switch {
	case err != nil:
		return netip.Addr{}, fail("list leases: " + said(err))
	case l == nil:
		return netip.Addr{}, fail("the DHCP server gave " + mac + " no address")
	}
	addr, err := netip.ParseAddr(l.GetIp())
	if err != nil {
		return addr, fail("the lease of " + mac + " has no address: " + err.Error())
	}
	has := vm.GetStatus().GetAddresses()
	if len(has) > 0 && !slices.Contains(has, addr.String()) {
		return addr, fail(fmt.Sprintf("the guest has %s, but its lease is %s", strings.Join(has, " "), addr))
	}
	return addr, pass(fmt.Sprintf("%s for %s", addr, mac), "until "+l.GetEnds().AsTime().UTC().Format("2006-01-02 15:04:05"))
}

// segmentMAC is the guest's MAC address on the segment: not that of its
// metadata interface. Empty if it has none.
func segmentMAC(vm *types.MicroVM) string {
	links := vm.GetStatus().GetNetworkInterfaces()
	for _, id := range slices.Sorted(maps.Keys(links)) {
		if mac := links[id].GetGuestMac(); mac != "" && !sameMAC(mac, metadataMAC) {
			return strings.ToLower(mac)
		}
	}
	return ""
}

func staticAddress(vm *types.MicroVM) netip.Addr {
	for _, i := range vm.GetSpec().GetInterfaces() {
		if sameMAC(i.GetGuestMac(), metadataMAC) {
			continue
		}
		if p, err := netip.ParsePrefix(i.GetAddress().GetAddress()); err == nil {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// checkPing sends an echo from the hub, which is on the segment.
func (s *survey) checkPing(ctx context.Context, to netip.Addr) finding {
	if _, err := s.hub.facts(); err != nil {
		return skip(s.hub.Name + " failed")
	}
	ctx, cancel := context.WithTimeout(ctx, pingPatience+patience)
	defer cancel()
	r, err := s.hub.client.Ping(ctx, &v1.PingRequest{Address: to.String(), Timeout: durationpb.New(pingPatience)})
	if err != nil {
		return fail(fmt.Sprintf("%s does not answer the hub: %s", to, said(err)))
	}
	return pass(fmt.Sprintf("%s answers the hub in %s", to, quick(r.GetRoundTrip().AsDuration())))
}

// notFound is the exit code of a command that the image does not have.
const notFound = 127

// checkAgent has the guest's agent do something. That an image has no such
// command is an answer of the agent, too.
func (h *hostSurvey) checkAgent(ctx context.Context, vm *types.MicroVM) finding {
	if !vm.GetSpec().GetAllowGuestAgent() {
		return skip("its spec does not allow one")
	}
	if !vm.GetStatus().GetAgentReady() {
		return fail(fmt.Sprintf("has not answered since the start %s ago", since(vm.GetStatus(), time.Now())))
	}
	start := time.Now()
	if _, _, err := h.exec(ctx, vm, "true"); err != nil {
		return fail(said(err))
	}
	return pass("answers in " + quick(time.Since(start)))
}

// checkOutside sends a packet from one of the host's microVMs through the hub, by
// its default route; if that is lost, to the far end of its uplink, which exists
// without any network.
func (s *survey) checkOutside(ctx context.Context, h *hostSurvey, hub *v1.HubFacts) finding {
	near := beyond(hub)
	far, _ := s.outside()
	if !far.IsValid() {
		far = near
	}
	if !far.IsValid() {
		return skip("no address beyond the hub is known")
	}
	found := s.pingFromGuest(ctx, h, far)
	if found.status != Fail || !near.IsValid() || near == far {
		return found
	}
	if s.pingFromGuest(ctx, h, near).status == Pass {
		return warn(found.detail + fmt.Sprintf("; %s is reached: the hub has no default route, or something on this machine drops it (`ingot doctor`)", near))
	}
	return found
}

// pingFromGuest has one of the host's microVMs ping an address, of those that
// somebody waits for if it can be.
func (s *survey) pingFromGuest(ctx context.Context, h *hostSurvey, to netip.Addr) finding {
	vms, err := h.list()
	if err != nil {
		return skip(h.Name + " failed")
	}
	last := func(vm *types.MicroVM) int {
		if s.awaited(vm) {
			return 0
		}
		return 1
	}
	vms = slices.SortedFunc(slices.Values(vms), func(a, b *types.MicroVM) int {
		return cmp.Or(cmp.Compare(last(a), last(b)), cmp.Compare(vmName(a), vmName(b)))
	})
	why := "no running microVM with an agent"
	for _, vm := range vms {
		if phase(vm) != "running" || !vm.GetStatus().GetAgentReady() || segmentMAC(vm) == "" {
			continue
		}
		start := time.Now()
		code, out, err := h.exec(ctx, vm, "ping", "-c", "1", "-W", fmt.Sprint(int(pingPatience.Seconds())), to.String())
		switch {
		case err != nil:
			return fail(fmt.Sprintf("%s: %s", vmName(vm), said(err)))
		case code == notFound:
			why = vmName(vm) + " has no ping"
			continue // another image may have one
		case code != 0:
			return fail(fmt.Sprintf("%s does not reach %s: %s", vmName(vm), to, cmp.Or(summary(out), fmt.Sprintf("ping ended with %d", code))))
		}
		return s.masqueraded(vm, fmt.Sprintf("%s reached %s in %s", vmName(vm), to, quick(time.Since(start))))
	}
	return skip(why)
}

// masqueraded looks as whom a microVM has reached what is outside. This machine
// knows the way back to the segment, so that a packet with the guest's own address
// is answered all the same; the rest of the world would not.
func (s *survey) masqueraded(vm *types.MicroVM, detail string) finding {
	if s.heard == nil {
		return pass(detail)
	}
	from := s.heard()
	for _, a := range from {
		if slices.Contains(vm.GetStatus().GetAddresses(), a.String()) {
			return fail(fmt.Sprintf("%s, but as %s, its own address, which nobody masquerades", detail, a))
		}
	}
	hub, _ := s.hub.facts()
	for _, i := range hub.GetInterfaces() {
		for _, a := range i.GetAddresses() {
			if p, err := netip.ParsePrefix(a); err == nil && i.GetName() == hub.GetNat().GetOutside() && slices.Contains(from, p.Addr()) {
				return pass(fmt.Sprintf("%s as %s", detail, p.Addr()))
			}
		}
	}
	return pass(detail)
}

// summary is ping's own: "1 packets transmitted, 0 packets received, …", or all
// that it said if that is not there.
func summary(out string) string {
	for line := range strings.Lines(out) {
		if strings.Contains(line, "transmitted") {
			return strings.TrimSpace(line)
		}
	}
	return strings.Join(strings.Fields(out), " ")
}

// beyond is the other end of the hub's uplink, if that is a link of two.
func beyond(hub *v1.HubFacts) netip.Addr {
	for _, i := range hub.GetInterfaces() {
		if i.GetName() != hub.GetNat().GetOutside() {
			continue
		}
		for _, a := range i.GetAddresses() {
			p, err := netip.ParsePrefix(a)
			if err != nil || !p.Addr().Is4() || p.Bits() != 30 {
				continue
			}
			first := p.Masked().Addr().Next()
			if first == p.Addr() {
				return first.Next()
			}
			return first
		}
	}
	return netip.Addr{}
}

// exec runs a command in a guest, and answers with its exit code and what it said.
func (h *hostSurvey) exec(ctx context.Context, vm *types.MicroVM, args ...string) (int, string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	stream, err := h.client.Exec(ctx)
	if err != nil {
		return 0, "", err
	}
	err = stream.Send(&v1.ExecRequest{Payload: &v1.ExecRequest_Start{Start: &v1.ExecStart{Uid: vm.GetSpec().GetUid(), Args: args}}})
	if err != nil && err != io.EOF { // of EOF, Recv has the reason
		return 0, "", err
	}
	const enough = 4 << 10
	var out []byte
	for {
		r, err := stream.Recv()
		if err != nil {
			return 0, string(out), err
		}
		if code, ok := r.GetPayload().(*v1.ExecResponse_ExitCode); ok {
			return int(code.ExitCode), string(out), nil
		}
		if len(out) < enough {
			out = append(append(out, r.GetStdout()...), r.GetStderr()...)
		}
	}
}
