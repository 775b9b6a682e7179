package env

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/vm"
)

// startMicroVMs makes the microVMs what the file says, or the first ones of a new
// environment without one.
func (u *up) startMicroVMs(ctx context.Context) (string, error) {
	have, silent := list(ctx, u.conns, u.env.Hosts())
	for _, host := range slices.Sorted(maps.Keys(silent)) {
		return "", fmt.Errorf("list microVMs of %s: %w", host, silent[host])
	}
	plan := planMicroVMs(u.env.MicroVMs, have)
	if err := plan.objections(u.Force).err(); err != nil {
		return "", err
	}
	var gone []placed
	gone = append(gone, plan.remove...)
	for _, r := range plan.replace {
		gone = append(gone, r.old)
		plan.create = append(plan.create, r.by)
	}
	if err := u.remove(ctx, gone); err != nil {
		return "", err
	}
	for _, m := range plan.create {
		spec, err := m.wanted()
		if err != nil {
			return "", fmt.Errorf("create microVM %s: %w", m, err)
		}
		if err := u.create(ctx, m, spec); err != nil {
			return "", err
		}
	}
	first, err := u.startFirst(ctx, have)
	if err != nil {
		return "", err
	}
	if len(gone)+len(plan.create)+first == 0 {
		return "none to make", nil
	}
	return fmt.Sprintf("%d removed, %d made", len(gone), len(plan.create)+first), nil
}

// startFirst makes the first microVMs of an environment without a file, and notes
// that it did. No file declares them: they are as if made by hand.
func (u *up) startFirst(ctx context.Context, have []placed) (made int, err error) {
	if !u.firstVMs() {
		return 0, nil
	}
	for _, m := range u.first() {
		if slices.ContainsFunc(have, func(h placed) bool { return h.name() == m.String() }) {
			continue // an earlier `up` was killed after this
		}
		spec, err := m.Proto()
		if err != nil {
			return made, err
		}
		if err := u.create(ctx, m, spec); err != nil {
			return made, err
		}
		made++
	}
	return made, removeIfThere(u.pendingPath())
}

// remove deletes microVMs and waits until they are gone.
func (u *up) remove(ctx context.Context, all []placed) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, p := range all {
		client := v1alpha1.NewMicroVMClient(u.conns.Hosts[p.host])
		group.Go(func() error {
			if _, err := client.DeleteMicroVM(ctx, &v1alpha1.DeleteMicroVMRequest{Uid: p.vm.GetSpec().GetUid()}); err != nil {
				return fmt.Errorf("remove microVM %s: %w", p.name(), err)
			}
			err := await(ctx, "remove microVM "+p.name()+" on "+p.host, func(ctx context.Context) error {
				r, err := client.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
				there := slices.ContainsFunc(r.GetMicrovm(), func(vm *types.MicroVM) bool { return vm.GetSpec().GetUid() == p.vm.GetSpec().GetUid() })
				if err == nil && there {
					err = fmt.Errorf("after %s it is still there", answerTime)
				}
				return err
			})
			if err != nil {
				return err
			}
			// Another of its name has the name at once. If this fails: leases end.
			for _, i := range p.vm.GetStatus().GetNetworkInterfaces() {
				_, _ = ingotv1.NewHubClient(u.conns.Hub).ReleaseLease(ctx, &ingotv1.ReleaseLeaseRequest{Mac: i.GetGuestMac()})
			}
			return nil
		})
	}
	return group.Wait()
}

func (u *up) create(ctx context.Context, m MicroVM, spec *types.MicroVMSpec) error {
	host, err := u.place(ctx, m, spec)
	if err != nil {
		return fmt.Errorf("create microVM %s: %w", m, err)
	}
	made, err := v1alpha1.NewMicroVMClient(u.conns.Hosts[host]).CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{Microvm: spec})
	if err != nil {
		return fmt.Errorf("create microVM %s on %s: %w", m, host, err)
	}
	if len(m.Egress) == 0 {
		return nil
	}
	// At once, and not with the others' access: it boots.
	uid := made.GetMicrovm().GetSpec().GetUid()
	if _, err := ingotv1.NewHubClient(u.conns.Hub).SetEgress(ctx, &ingotv1.SetEgressRequest{Uid: uid, Rules: m.Egress}); err != nil {
		return fmt.Errorf("restrict microVM %s: %w", m, err)
	}
	return nil
}

// place is the host of a microVM: the one that it names, else the one with most room.
func (u *up) place(ctx context.Context, m MicroVM, need *types.MicroVMSpec) (string, error) {
	if m.Host != "" {
		return m.Host, nil
	}
	var names []string
	facts := map[string]*ingotv1.HostFacts{}
	for _, h := range u.env.Hosts() {
		f, err := ingotv1.NewHostClient(u.conns.Hosts[h.Name]).Facts(ctx, &emptypb.Empty{})
		if err != nil {
			return "", fmt.Errorf("%s: %w", h.Name, err)
		}
		names, facts[h.Name] = append(names, h.Name), f
	}
	return Place(names, facts, need)
}

// Place chooses the host for a microVM, of those that let one more in: the one with
// most memory that is not promised, else with fewer microVMs, else the first. Those
// without facts are not chosen, and there must be one with them.
func Place(hosts []string, facts map[string]*ingotv1.HostFacts, need *types.MicroVMSpec) (string, error) {
	// A host that has no limit lets all in, and is chosen by what it has.
	memory := func(host string) int64 {
		f := facts[host]
		return cmp.Or(f.GetMemoryLimitBytes(), f.GetMemoryBytes()) - f.GetMemoryCommittedBytes()
	}
	var full []string
	var best string
	for _, h := range hosts {
		if facts[h] == nil {
			continue
		}
		if why := lacks(facts[h], need); why != "" {
			full = append(full, h+": "+why)
			continue
		}
		if best == "" || cmp.Or(cmp.Compare(memory(best), memory(h)), cmp.Compare(facts[h].GetMicrovms(), facts[best].GetMicrovms())) < 0 {
			best = h
		}
	}
	if best == "" {
		return "", fmt.Errorf("%w: %s", errdefs.ErrResourceExhausted, strings.Join(full, "; "))
	}
	return best, nil
}

// lacks says what a host has too little of; empty: nothing. What a spec leaves out is
// what flintlock gives it.
func lacks(f *ingotv1.HostFacts, need *types.MicroVMSpec) string {
	var all []string
	check := func(what string, asked, promised, limit int64) {
		if limit > 0 && promised+asked > limit {
			all = append(all, fmt.Sprintf("%d %s asked for, and %d of %d are promised", asked, what, promised, limit))
		}
	}
	check("MiB", int64(cmp.Or(need.GetMemoryInMb(), int32(vm.DefaultMemory))), f.GetMemoryCommittedBytes()>>20, f.GetMemoryLimitBytes()>>20)
	check("CPUs", int64(cmp.Or(need.GetVcpu(), vm.DefaultVCPU)), int64(f.GetVcpusCommitted()), int64(f.GetVcpusLimit()))
	check("microVM", 1, int64(f.GetMicrovmsCommitted()), int64(f.GetMicrovmsLimit()))
	return strings.Join(all, ", ")
}

// pendingPath is a file that is there until the first microVMs were made: those
// that are deleted later don't come back.
func (u *up) pendingPath() string {
	return filepath.Join(Env{Name: u.name}.Dir(), "first-microvms-pending")
}

// firstVMs says whether the first microVMs are to be made.
func (u *up) firstVMs() bool {
	if u.NoVMs || u.Declared != nil {
		return false
	}
	_, err := os.Stat(u.pendingPath())
	return u.was == nil || err == nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// first are the microVMs of an environment that no file describes.
func (u *up) first() []MicroVM {
	var all []MicroVM
	for i, m := range u.env.Hosts() {
		all = append(all, MicroVM{Name: fmt.Sprintf("vm-%d", i), Host: m.Name, Image: "busybox"})
	}
	return all
}
