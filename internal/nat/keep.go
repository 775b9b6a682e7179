package nat

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// KeepHost sets the host's tables, and sets them again whenever somebody has
// changed them, until ctx ends: `nft flush ruleset` or a firewall's restart must
// not let guests in. It calls ready once the tables are in force, and restored
// after each time that it had to set them again.
func KeepHost(ctx context.Context, h Host, ready, restored func()) error {
	for first := true; ; first = false {
		err := keepHost(ctx, h, func() {
			if first {
				ready()
			} else {
				restored()
			}
		}, restored)
		if ctx.Err() != nil {
			return nil
		}
		// The kernel drops a listener that can't keep up: look, and listen again.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

func keepHost(ctx context.Context, h Host, ready, restored func()) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	monitor := nftables.NewMonitor(nftables.WithMonitorAction(nftables.MonitorActionAny), nftables.WithMonitorObject(nftables.MonitorObjectRuleset))
	changes, err := c.AddGenerationalMonitor(monitor)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer func() {
		monitor.Close()
		for range changes { // until its goroutine has heard
		}
	}()
	if err := SetHost(h); err != nil {
		return err
	}
	want, err := handles()
	if err != nil {
		return err
	}
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case change, ok := <-changes:
			if !ok {
				return unix.ENOBUFS
			}
			if g := change.GeneratedBy; g != nil && g.Error != nil {
				return fmt.Errorf("watch nftables: %w", g.Error)
			}
		}
		have, err := handles()
		if err != nil {
			return err
		}
		if slices.Equal(have, want) {
			continue
		}
		if err := SetHost(h); err != nil {
			return err
		}
		if want, err = handles(); err != nil {
			return err
		}
		restored()
	}
}

// handles are the kernel's numbers of all rules in our tables. A rule that is
// made anew has another one.
func handles() ([]uint64, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	var all []uint64
	for _, chain := range chains {
		if chain.Table.Name != Table {
			continue
		}
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil && !errors.Is(err, unix.ENOENT) { // it may have gone since
			return nil, fmt.Errorf("read nftables: %w", err)
		}
		for _, r := range rules {
			all = append(all, r.Handle)
		}
	}
	return all, nil
}
