package host

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

// Resize makes a volume of a microVM larger, from its next start on: the file
// system in it can't grow under a guest that has it mounted without the guest's
// help. An empty id is the root volume's.
func (h *Host) Resize(uid, id string, size vm.MiB) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	if err := v.change(func(r *record) error { return v.resize(r, id, size) }); err != nil {
		return View{}, fmt.Errorf("resize a volume of %s: %w", v.spec.Name, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tell()
	return v.viewLocked(), nil
}

// resize changes the size in a record; Prepare does the rest.
func (v *instance) resize(next *record, id string, size vm.MiB) error {
	if next.Deleting {
		return fmt.Errorf("it is being deleted: %w", errdefs.ErrFailedPrecondition)
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

// sizeOf is how large a volume is, or will be. One that could not grow later, and
// so would keep its microVM from starting, is an error.
func (v *instance) sizeOf(volume vm.Volume) (vm.MiB, error) {
	f, err := os.Open(v.view().Status.Volumes[volume.ID])
	if errors.Is(err, os.ErrNotExist) {
		return volume.Size, nil // it is not made yet
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := pool.Ext4Size(f); err != nil {
		return 0, err
	}
	info, err := f.Stat()
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
