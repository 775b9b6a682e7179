package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

// place is the host for a microVM: the one that is asked for, else the one with
// most memory that is not promised, else with fewer microVMs, else the first.
func (c *cloud) place(ctx context.Context, wanted string, spec *types.MicroVMSpec) (*hostClient, error) {
	if wanted != "" {
		return c.host(wanted)
	}
	var mu sync.Mutex
	facts := map[*hostClient]*ingotv1.HostFacts{}
	err := c.on(c.hosts, func(h *hostClient) error {
		f, err := h.HostClient.Facts(ctx, &emptypb.Empty{})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		facts[h] = f
		return nil
	})
	if len(facts) == 0 {
		return nil, fmt.Errorf("choose a host: %w", err)
	}
	best := choose(c.hosts, facts)
	if need := int64(spec.GetMemoryInMb()) << 20; room(facts[best]) < need {
		return nil, fmt.Errorf("choose a host: %w: %d MiB asked for, and the most that a host has to promise is %d MiB on %s",
			errdefs.ErrResourceExhausted, spec.GetMemoryInMb(), max(0, room(facts[best]))>>20, best.Name)
	}
	return best, nil
}

// room is the memory of a host that no microVM was promised.
func room(f *ingotv1.HostFacts) int64 { return f.GetMemoryBytes() - f.GetMemoryCommittedBytes() }

// choose is the host of facts with most room; hosts says their order.
func choose(hosts []*hostClient, facts map[*hostClient]*ingotv1.HostFacts) *hostClient {
	answered := slices.DeleteFunc(slices.Clone(hosts), func(h *hostClient) bool { return facts[h] == nil })
	return slices.MinFunc(answered, func(a, b *hostClient) int {
		return cmp.Or(cmp.Compare(room(facts[b]), room(facts[a])), cmp.Compare(facts[a].GetMicrovms(), facts[b].GetMicrovms()))
	})
}
