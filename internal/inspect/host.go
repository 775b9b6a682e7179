package inspect

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	v1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

func (s *survey) hostStep(h *hostSurvey) step {
	facts := func() *v1.HostFacts { // only called below a check that has had them
		f, _ := h.facts()
		return f
	}
	ctd := func() *v1.ContainerdFacts { return facts().GetContainerd() }
	return step{
		name: h.Name,
		check: func(context.Context) finding {
			f, err := h.facts()
			if err != nil {
				return unreachable(h.Machine, "the host daemon", err)
			}
			return pass(fmt.Sprintf("version %s, up %s, memory %s, %s", f.GetVersion(), age(f.GetUptime().AsDuration()),
				bytes(f.GetDaemonRssBytes()), count(int(f.GetMicrovms()), "microVM", "microVMs")),
				"unit: flintlockd.service", "port: 9090/tcp, gRPC at "+cmp.Or(f.GetGrpcEndpoint(), h.Endpoint), "hostname: "+f.GetHostname(),
				"configuration: "+f.GetConfigFile(), "state: "+f.GetStateDir(),
				"kernel: "+f.GetKernel()+", booted "+f.GetBootTime().AsTime().UTC().Format("2006-01-02 15:04:05"))
		},
		children: []step{
			{name: "address", check: func(context.Context) finding { return checkAddress(facts().GetInterfaces(), segment, h.Address) }},
			{name: "memory", check: func(context.Context) finding { return checkMemory(facts()) }},
			{name: "limits", check: func(context.Context) finding { return checkLimits(facts()) }},
			{name: "containerd", check: func(context.Context) finding { return checkContainerd(ctd()) }, children: []step{
				{name: "images", check: func(context.Context) finding {
					return pass(fmt.Sprint(ctd().GetImages()), ctd().GetImageNames()...)
				}},
				{name: "leases", check: func(ctx context.Context) finding { return h.checkLeases(ctx) }},
				{name: "snapshots", check: func(context.Context) finding {
					return pass(fmt.Sprintf("%d by %s", ctd().GetSnapshots(), ctd().GetSnapshotter()))
				}},
				{name: "content", check: func(context.Context) finding {
					return pass(fmt.Sprintf("%s, %s", count(int(ctd().GetContent()), "blob", "blobs"), bytes(ctd().GetContentBytes())))
				}},
			}},
			{name: "pool", check: func(context.Context) finding { return checkPool(facts().GetPool()) }},
			{name: "records", check: func(context.Context) finding { return checkRecords(facts()) }},
			{name: "driver", check: func(context.Context) finding { return checkDriver(facts()) }},
			{name: "interfaces", check: func(context.Context) finding { return h.checkInterfaces() }},
			{name: "microVMs", check: func(context.Context) finding { return h.checkList() }, more: func() []step { return s.vmSteps(h) }},
		},
	}
}

func checkMemory(f *v1.HostFacts) finding {
	detail := fmt.Sprintf("%s of %s available, %s and %d vCPUs promised to microVMs, %d CPUs", bytes(f.GetMemoryAvailableBytes()),
		bytes(f.GetMemoryBytes()), bytes(f.GetMemoryCommittedBytes()), f.GetVcpusCommitted(), f.GetVcpus())
	switch {
	case f.GetMemoryAvailableBytes()*20 < f.GetMemoryBytes():
		return warn("nearly all is in use: " + detail)
	case f.GetMemoryCommittedBytes() > f.GetMemoryBytes():
		return warn("more is promised than there is: " + detail)
	}
	return pass(detail)
}

// checkLimits warns before a microVM is refused.
func checkLimits(f *v1.HostFacts) finding {
	var all, near []string
	for _, l := range []struct {
		now, most int64
		text      string
	}{
		{int64(f.GetMicrovmsCommitted()), int64(f.GetMicrovmsLimit()), fmt.Sprintf("%d of %d microVMs", f.GetMicrovmsCommitted(), f.GetMicrovmsLimit())},
		{int64(f.GetVcpusCommitted()), int64(f.GetVcpusLimit()), fmt.Sprintf("%d of %d vCPUs", f.GetVcpusCommitted(), f.GetVcpusLimit())},
		{f.GetMemoryCommittedBytes(), f.GetMemoryLimitBytes(), fmt.Sprintf("%s of %s", bytes(f.GetMemoryCommittedBytes()), bytes(f.GetMemoryLimitBytes()))},
	} {
		if l.most == 0 {
			continue
		}
		all = append(all, l.text)
		if l.now*10 >= l.most*9 {
			near = append(near, l.text)
		}
	}
	switch {
	case len(all) == 0:
		return pass("none")
	case len(near) > 0:
		return warn("nearly all that microVMs may be promised is: " + strings.Join(near, ", "))
	}
	return pass(strings.Join(all, ", ") + " promised")
}

func checkContainerd(c *v1.ContainerdFacts) finding {
	if !c.GetServing() {
		return fail(fmt.Sprintf("%s does not answer: %s", cmp.Or(c.GetSocket(), "its socket"), cmp.Or(c.GetError(), "it is not running")))
	}
	return pass(fmt.Sprintf("version %s on %s", c.GetVersion(), c.GetSocket()),
		"unit: containerd.service", "socket: "+c.GetSocket(), "namespace: "+c.GetNamespace(), "snapshotter: "+c.GetSnapshotter())
}

// checkLeases holds containerd's leases against the microVMs: one each.
func (h *hostSurvey) checkLeases(ctx context.Context) finding {
	f, _ := h.facts()
	ids := f.GetContainerd().GetLeaseIds()
	vms, err := h.list()
	if err != nil {
		return skip("microVMs failed")
	}
	var missing []string
	for _, vm := range vms {
		if phase(vm) == "running" && !slices.Contains(ids, leaseID(vm)) {
			missing = append(missing, leaseID(vm))
		}
	}
	if len(missing) > 0 {
		return fail("nothing holds the volumes of: " + strings.Join(missing, ", "))
	}
	return pass(fmt.Sprint(len(ids)), ids...)
}

func leaseID(vm *types.MicroVM) string {
	return fmt.Sprintf("flintlock/%s/%s/%s", vm.GetSpec().GetNamespace(), vm.GetSpec().GetId(), vm.GetSpec().GetUid())
}

func checkPool(p *v1.PoolFacts) finding {
	size := max(p.GetSizeBytes(), 1)
	full := p.GetUsedBytes() * 100 / size
	detail := fmt.Sprintf("%s at %s, %d %% of %s in use", p.GetKind(), p.GetPath(), full, bytes(p.GetSizeBytes()))
	notes := []string{"path: " + p.GetPath(), fmt.Sprintf("reflink: %v", p.GetReflink()), "free below it: " + bytes(p.GetBackingFreeBytes())}
	switch {
	case p.GetPath() == "":
		return fail("there is none")
	case !p.GetReflink() && p.GetKind() != "thin":
		return fail("cannot share blocks: " + detail)
	case p.GetFull() != "":
		return fail("full: " + p.GetFull())
	case p.GetLow() != "":
		return warn("nearly full: " + p.GetLow() + ": " + detail)
	}
	return pass(detail, notes...)
}

// checkRecords says which microVMs the host knows of and can't keep.
func checkRecords(f *v1.HostFacts) finding {
	broken := f.GetBrokenRecords()
	if len(broken) == 0 {
		return pass("all can be read")
	}
	var all []string
	for _, b := range broken {
		all = append(all, fmt.Sprintf("%s: %s", b.GetPath(), b.GetError()))
	}
	return fail("left as they are: " + strings.Join(all, "; ") +
		". Mend the file, or remove it to have it made anew from containerd's copy; then restart flintlockd")
}

// checkDriver passes without KVM: a host that emulates is slower, not ill.
func checkDriver(f *v1.HostFacts) finding {
	var notes []string
	var chosen *v1.DriverFacts
	for _, d := range f.GetDrivers() {
		note := fmt.Sprintf("%s %s: available", d.GetName(), d.GetVersion())
		if !d.GetAvailable() {
			note = fmt.Sprintf("%s: %s", d.GetName(), cmp.Or(d.GetReason(), "not available"))
		} else if chosen == nil || d.GetName() == f.GetDefaultDriver() {
			chosen = d
		}
		notes = append(notes, note)
	}
	if chosen == nil {
		return fail("no driver can be used: " + cmp.Or(strings.Join(notes, "; "), "there is none"))
	}
	detail := fmt.Sprintf("%s %s with %s", chosen.GetName(), chosen.GetVersion(), chosen.GetAccelerator())
	if chosen.GetReason() != "" {
		detail += ", since KVM cannot be used here"
		notes = append(notes, chosen.GetReason())
	}
	return pass(detail, notes...)
}

// checkInterfaces counts the microVMs' interfaces and finds those of nobody.
func (h *hostSurvey) checkInterfaces() finding {
	f, _ := h.facts()
	vms, err := h.list()
	if err != nil {
		return skip("microVMs failed")
	}
	var own, notes, stray []string
	for _, i := range f.GetInterfaces() {
		tap := strings.HasPrefix(i.GetName(), "fltap") || strings.HasPrefix(i.GetName(), "flvtap")
		known := slices.ContainsFunc(vms, func(vm *types.MicroVM) bool { return vm.GetSpec().GetUid() == i.GetVmUid() })
		switch {
		case known:
			own = append(own, i.GetName())
			notes = append(notes, fmt.Sprintf("%d: %s: %s of %s, %s", i.GetIndex(), i.GetName(), i.GetKind(), i.GetVmUid(), cmp.Or(i.GetMaster(), "not bridged")))
		case tap && i.GetVmUid() == "":
			stray = append(stray, i.GetName())
		}
	}
	if len(stray) > 0 {
		return warn("no microVM's: " + strings.Join(stray, ", "))
	}
	return pass(fmt.Sprintf("%d of %s", len(own), count(len(vms), "microVM", "microVMs")), notes...)
}

func (h *hostSurvey) checkList() finding {
	vms, err := h.list()
	if err != nil {
		return fail("list microVMs: " + said(err))
	}
	running := 0
	for _, vm := range vms {
		if phase(vm) == "running" {
			running++
		}
	}
	return pass(fmt.Sprintf("%d, %d running", len(vms), running))
}
