package host

import (
	"context"
	"runtime"
	"time"

	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// How many guests may boot at the same time, for each CPU: a guest that is
// translated is at work all the time that it boots. More of them at once take longer
// than one after the other, and so long that what they wait for gives up.
const (
	translatedTurns = 2
	nativeTurns     = 16
)

// longestTurn is what a guest has that never says that it is ready.
const longestTurn = 15 * time.Second

// turns has a place for each guest that may boot.
type turns chan struct{}

func newTurns(drivers []vmm.Driver) turns {
	each := translatedTurns
	for _, d := range drivers {
		if d.Facts().Accelerator == "kvm" {
			each = nativeTurns
		}
	}
	return make(turns, each*runtime.NumCPU())
}

// take waits for a turn; waiting is called if there is none yet.
func (t turns) take(ctx context.Context, waiting func()) error {
	select {
	case t <- struct{}{}:
		return nil
	default:
	}
	waiting()
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turns) giveBack() { <-t }

// booted returns when the guest's agent is ready, the hypervisor has ended, or its
// turn has taken long enough.
func (v *instance) booted(m vmm.Machine) {
	views, cancel := v.subscribe()
	defer cancel()
	patience := time.NewTimer(longestTurn)
	defer patience.Stop()
	for {
		select {
		case w, ok := <-views:
			if !ok || w.Status.AgentReady || w.Status.Phase != vm.Running {
				return
			}
		case <-m.Done():
			return
		case <-patience.C:
			return
		case <-v.host.ctx.Done():
			return
		}
	}
}
