package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"ingot/internal/pool"
	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// Resize makes a volume of a microVM larger: one that runs sees it at once, and
// its guest grows the file system. later says why it sees it from its next start on
// only; what was asked for is on record all the same. An empty id is the root
// volume's.
func (h *Host) Resize(uid, id string, size vm.MiB) (_ View, later string, err error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, "", err
	}
	if err := v.change(func(r *record) error { return v.resize(r, id, size) }); err != nil {
		return View{}, "", fmt.Errorf("resize a volume of %s: %w", v.spec.Name, err)
	}
	ctx, cancel := context.WithTimeout(v.host.ctx, askTime)
	defer cancel()
	select {
	case <-v.seen:
		err = v.grow(ctx)
	case <-ctx.Done():
		err = errors.New("the daemon has just started, and does not know yet whether the microVM runs")
	}
	if err != nil {
		v.log.Warn("grow volumes", "err", err)
		later = err.Error()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tell()
	return v.viewLocked(), later, nil
}

// grow makes all volumes as large as the record says, and has a guest that runs see
// it. It finds what is done already, so that a daemon goes on where another was
// killed; what is never done here, Prepare does at the next start.
func (v *instance) grow(ctx context.Context) error {
	if v.kept != nil {
		return nil // they stay as flintlock has made them
	}
	v.growing.Lock()
	defer v.growing.Unlock()
	v.mu.Lock()
	m, spec, status := v.machine, v.record.Spec, v.status
	v.mu.Unlock()
	var problems []error
	for i, volume := range append([]vm.Volume{spec.Root}, spec.Volumes...) {
		has, known := status.VolumeSizes[volume.ID]
		if volume.ReadOnly || known && volume.Size <= has {
			continue
		}
		size, err := growVolume(ctx, status.Volumes[volume.ID], volume.Size, m, i)
		switch {
		case err != nil:
			problems = append(problems, fmt.Errorf("volume %s: %w", volume.ID, err))
		case m != nil:
			v.log.Info("volume is as large as asked for", "volume", volume.ID, "mib", size)
			v.set(func(s *vm.Status) {
				if s.VolumeSizes = maps.Clone(s.VolumeSizes); s.VolumeSizes == nil {
					s.VolumeSizes = map[string]vm.MiB{}
				}
				s.VolumeSizes[volume.ID] = size
			})
		}
	}
	return errors.Join(problems...)
}

// growVolume makes one volume larger, and has the guest see it if there is one.
func growVolume(ctx context.Context, path string, size vm.MiB, m vmm.Machine, disk int) (vm.MiB, error) {
	switch {
	case path == "" && m == nil:
		return 0, nil // it is not made yet
	case path == "":
		return 0, errors.New("it is not known where it is")
	}
	bytes, err := pool.Extend(path, size)
	if err == nil && m != nil {
		err = m.Grow(ctx, disk, bytes)
	}
	return vm.MiB(bytes >> 20), err
}

// resize changes the size in a record; grow and Prepare do the rest.
func (v *instance) resize(next *record, id string, size vm.MiB) error {
	if next.Deleting {
		return fmt.Errorf("it is being deleted: %w", errdefs.ErrFailedPrecondition)
	}
	if next.Flintlock != nil {
		return fmt.Errorf("flintlock has made its volumes: %w", errdefs.ErrFailedPrecondition)
	}
	next.Spec.Volumes = slices.Clone(next.Spec.Volumes)
	volume := &next.Spec.Root
	if at := slices.IndexFunc(next.Spec.Volumes, func(o vm.Volume) bool { return o.ID == id }); at >= 0 {
		volume = &next.Spec.Volumes[at]
	}
	switch {
	case id != "" && volume.ID != id:
		return &vm.FieldError{Field: "volume_id", Problem: fmt.Sprintf("there is no volume %q", id)}
	case volume.ReadOnly:
		return &vm.FieldError{Field: "volume_id", Problem: fmt.Sprintf("%s is read-only: it stays as its image is", volume.ID)}
	}
	has, err := v.sizeOf(*volume)
	if err != nil {
		return err
	}
	if size < has {
		return &vm.FieldError{Field: "size_in_mb", Problem: fmt.Sprintf("%s has %d MiB already, and a volume never shrinks", volume.ID, has)}
	}
	if size == volume.Size {
		return nil
	}
	volume.Size = size
	if err := next.Spec.Validate(); err != nil {
		return err
	}
	return v.host.roomFor(size - has)
}

// sizeOf is how large a volume is, or will be.
func (v *instance) sizeOf(volume vm.Volume) (vm.MiB, error) {
	info, err := os.Stat(v.view().Status.Volumes[volume.ID])
	if errors.Is(err, os.ErrNotExist) {
		return volume.Size, nil // it is not made yet
	}
	if err != nil {
		return 0, err
	}
	return max(volume.Size, vm.MiB(info.Size()>>20)), nil
}

// roomFor says whether the pool has room for so much more.
func (h *Host) roomFor(more vm.MiB) error {
	if h.c.Pool == "" {
		return nil
	}
	f, err := pool.ReadFacts(h.c.Pool)
	if err != nil {
		return err
	}
	if err := f.Full(); err != nil {
		return err
	}
	if more.Bytes() > f.Available {
		return fmt.Errorf("%d MiB more, and the pool at %s has %d MiB left: %w", more, f.Path, f.Available>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}
