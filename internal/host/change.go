package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// digest is of a spec as it was recorded, but for when.
func digest(s vm.Spec) string {
	s.CreatedAt = time.Time{}
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // our own type, all of which can be marshalled
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// Restart shuts a microVM down as Stop does, and starts it again. It returns when
// that runs.
func (h *Host) Restart(ctx context.Context, uid string, timeout time.Duration) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	if _, err := h.driver(v.spec); errdefs.IsNotImplemented(err) {
		return View{}, fmt.Errorf("restart microVM %s: %w", v.spec.Name, err) // it would only stop
	}
	asked, by := time.Now(), time.Now().Add(timeout)
	if err := v.wantRun(func(r *record) error {
		err := r.stop(true)
		r.StopBy, r.Patience, r.Again = by, timeout, true
		return err
	}); err != nil {
		return View{}, err
	}
	runs := func(s vm.Status) bool {
		return (s.Phase == vm.Running || s.Phase == vm.Paused) && s.StartedAt.After(asked)
	}
	return v.await(ctx, runs, func(r record) bool { return !r.Stopped || r.Again })
}

// Pause has a running microVM's CPUs stand still, until Resume. Of one that ends
// meanwhile, also by the end of the machine, nothing is paused any more.
func (h *Host) Pause(ctx context.Context, uid string) (View, error) {
	return h.setPaused(ctx, uid, true, vm.Paused)
}

// Resume has them go on.
func (h *Host) Resume(ctx context.Context, uid string) (View, error) {
	return h.setPaused(ctx, uid, false, vm.Running)
}

func (h *Host) setPaused(ctx context.Context, uid string, paused bool, then vm.Phase) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	w := v.view()
	if p := w.Status.Phase; p != vm.Running && p != vm.Paused {
		return View{}, fmt.Errorf("microvm %s does not run (state: %s): %w", w.Spec.Name, p, errdefs.ErrFailedPrecondition)
	}
	if h.lacks(w.Status.Driver, vmm.Pause) {
		return View{}, fmt.Errorf("microvm %s: %s can't be paused here: %w", w.Spec.Name, w.Status.Driver, errdefs.ErrNotImplemented)
	}
	if err := v.want(func(r *record) error {
		if r.Deleting || r.Stopped {
			return fmt.Errorf("microvm %s is being stopped: %w", r.Spec.Name, errdefs.ErrFailedPrecondition)
		}
		r.Paused = paused
		return nil
	}); err != nil {
		return View{}, err
	}
	return v.await(ctx, func(s vm.Status) bool { return s.Phase == then }, func(r record) bool { return r.Paused == paused && !r.Stopped })
}

// await waits until a microVM is so, as long as that is still what it should be.
func (v *instance) await(ctx context.Context, so func(vm.Status) bool, still func(record) bool) (View, error) {
	views, cancel := v.subscribe()
	defer cancel()
	for {
		select {
		case w, there := <-views:
			switch {
			case !there:
				return View{}, fmt.Errorf("microvm spec %s not found%w", v.spec.UID, silent{errdefs.ErrNotFound})
			case so(w.Status):
				return w, nil
			case w.Status.Phase == vm.Deleting, w.Status.Phase == vm.Failed:
				return View{}, fmt.Errorf("microvm %s is %s: %s: %w", w.Spec.Name, w.Status.Phase, w.Status.Reason, errdefs.ErrFailedPrecondition)
			case !v.wants(still):
				return View{}, fmt.Errorf("microvm %s is %s: it has ended, or somebody wants something else of it: %w", w.Spec.Name, w.Status.Phase, errdefs.ErrFailedPrecondition)
			}
		case <-ctx.Done():
			return View{}, context.Cause(ctx)
		}
	}
}

func (v *instance) wants(this func(record) bool) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return this(v.record)
}

// pause stops the CPUs, or has them go on.
func (v *instance) pause(ctx context.Context, paused bool) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	do, phase := v.machine.Resume, vm.Running
	if paused {
		do, phase = v.machine.Pause, vm.Paused
	}
	if err := do(ctx); err != nil {
		v.log.Error("pause or resume", "err", err)
		v.set(func(s *vm.Status) { s.Reason, s.RetryAt = err.Error(), time.Now().Add(firstDelay) })
		return
	}
	v.set(func(s *vm.Status) { s.Phase, s.Reason, s.RetryAt = phase, "", time.Time{} })
}

// Update changes what a microVM is called by, what it is told, which the guest finds
// changed when it asks next, and which addresses it may use, from now on.
func (h *Host) Update(uid string, change func(*vm.Mutable)) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	addresses := false
	if err := v.change(func(r *record) error {
		if r.Deleting {
			return fmt.Errorf("microvm %s is being deleted: %w", r.Spec.Name, errdefs.ErrFailedPrecondition)
		}
		next := vm.Mutable{Labels: clone(r.Spec.Labels), Metadata: clone(r.Spec.Metadata), AllowedAddresses: slices.Clone(r.Spec.AllowedAddresses)}
		change(&next)
		if r.Flintlock != nil && !maps.Equal(next.Metadata, r.Spec.Metadata) {
			return fmt.Errorf("microvm %s: its guest is told what flintlock has given its hypervisor: %w", r.Spec.Name, errdefs.ErrFailedPrecondition)
		}
		addresses = !slices.Equal(next.AllowedAddresses, r.Spec.AllowedAddresses) || v.unguarded.Load()
		r.Spec.Labels, r.Spec.Metadata, r.Spec.AllowedAddresses = next.Labels, next.Metadata, next.AllowedAddresses
		return r.Spec.Validate()
	}); err != nil {
		return View{}, err
	}
	if addresses {
		v.unguarded.Store(true) // another Update, of anything, tries again
		if err := v.guardAgain(); err != nil {
			return View{}, fmt.Errorf("allow addresses to %s: %w", v.spec.Name, err)
		}
	}
	v.retell.Store(true)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tell()
	w := v.viewLocked()
	h.events.relabel(Changed, w, v.labeled) // of another Update, too, that has yet to tell
	v.labeled = w.Spec.Labels
	v.poke()
	return w, nil
}

func clone(m map[string]string) map[string]string {
	c := maps.Clone(m)
	if c == nil {
		c = map[string]string{}
	}
	return c
}
