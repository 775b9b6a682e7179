package image

import (
	"context"
	"fmt"
	"slices"
	"time"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

// Collector deletes images that no microVM uses: those that were not used for
// long, and where the pool is nearly full, the others too, the longest unused
// first. A stopped microVM uses its images as well.
type Collector struct {
	Images *Store
	VMs    func() []vm.Spec // the microVMs that are there
	Unused time.Duration    // how long one stays without use; 0: for ever
	Pool   string           // the directory of the pool; empty: how full it is does not matter
	Full   int              // percent of the pool from which there is no waiting; 0: DefaultFull
}

const (
	// DefaultUnused is a week, in which most that was tried is tried again.
	DefaultUnused = 7 * 24 * time.Hour
	// DefaultFull leaves room for what running microVMs write until somebody looks.
	DefaultFull = 85

	collectEvery = time.Hour
	// fresh is what an image is left in any case: a create may be about to use it.
	fresh = time.Hour
)

func (c Collector) String() string { return "image collector" }

// Run collects from time to time, until ctx ends.
func (c Collector) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if _, err := c.Collect(ctx, time.Now()); err != nil && ctx.Err() == nil {
			c.Images.c.Log.Warn("collect images", "err", err)
		}
	}
}

// Collect deletes what is due at that time, and says what it was.
func (c Collector) Collect(ctx context.Context, now time.Time) ([]Held, error) {
	var gone []Held
	if c.Unused > 0 {
		var err error
		if gone, err = c.Images.Prune(ctx, c.VMs(), now.Add(-max(c.Unused, fresh))); err != nil {
			return gone, err
		}
	}
	full, err := c.full()
	if err != nil || !full {
		return gone, err
	}
	here, err := c.Images.Images(ctx, c.VMs())
	if err != nil {
		return gone, fmt.Errorf("collect images: %w", err)
	}
	unused := slices.DeleteFunc(here, func(h Held) bool { return len(h.VMs) > 0 || h.Used.After(now.Add(-fresh)) })
	slices.SortFunc(unused, func(a, b Held) int { return a.Used.Compare(b.Used) })
	for _, h := range unused {
		if err := c.Images.delete(ctx, []Held{h}); err != nil {
			return gone, err
		}
		gone = append(gone, h)
		if full, err = c.full(); err != nil || !full {
			return gone, err
		}
	}
	return gone, nil
}

func (c Collector) full() (bool, error) {
	if c.Pool == "" {
		return false, nil
	}
	f, err := pool.ReadFacts(c.Pool)
	if err != nil {
		return false, fmt.Errorf("collect images: %w", err)
	}
	limit := c.Full
	if limit == 0 {
		limit = DefaultFull
	}
	return f.Size > 0 && f.Used*100 >= f.Size*int64(limit), nil
}
