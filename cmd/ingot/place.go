package main

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/env"
)

// place is the host for a microVM: the one that is asked for, else what env.Place says.
func (c *cloud) place(ctx context.Context, wanted string, spec *types.MicroVMSpec) (*hostClient, error) {
	if wanted != "" {
		return c.host(wanted)
	}
	var mu sync.Mutex
	facts := map[string]*ingotv1.HostFacts{}
	err := c.on(c.hosts, func(h *hostClient) error {
		f, err := h.HostClient.Facts(ctx, &emptypb.Empty{})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		facts[h.Name] = f
		return nil
	})
	if len(facts) == 0 {
		return nil, fmt.Errorf("choose a host: %w", err)
	}
	best, err := env.Place(names(c.hosts), facts, spec)
	if err != nil {
		return nil, fmt.Errorf("choose a host: %w", err)
	}
	return c.host(best)
}
