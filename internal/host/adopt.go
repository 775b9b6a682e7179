package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/flintlock"
	"ingot/internal/link"
	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// blob is a record in containerd's content store: a copy of ours, written once, or one
// of flintlock's, which writes one at each change.
type blob struct {
	version string // as its label has it
	data    []byte
}

// rebuild makes the record of a lease that has none: anew from our copy in containerd,
// or from flintlock's record, whose microVM is ours to keep from then on. It
// releases the lease if there is neither.
func (h *Host) rebuild(ctx context.Context, lease, dir string) error {
	var ours, theirs []blob
	err := h.c.Images.Recorded(ctx, map[string]string{typeLabel: "microvm", uidLabel: filepath.Base(dir)}, func(labels map[string]string, data []byte) error {
		b := blob{labels[versionLabel], data}
		if flintlock.Wrote(data) {
			theirs = append(theirs, b)
		} else {
			ours = append(ours, b)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var r record
	switch {
	case len(ours) > 0:
		r, err = h.copied(dir, ours)
	case len(theirs) > 0:
		r, err = h.translated(dir, theirs)
	case flintlock.Began(dir):
		err = errors.New("flintlock has made it, and containerd has no record of it")
	default:
		h.c.Log.Info("removing a leftover lease", "lease", lease)
		return h.c.Images.Release(ctx, lease)
	}
	if err == nil {
		err = r.create()
	}
	if err != nil { // nothing else is known of it, and all of it must stay
		h.report(Broken{filepath.Join(dir, recordName), err})
		return nil
	}
	if r.Flintlock != nil {
		h.c.Log.Info("taken over from flintlock", "vm", r.Spec.Namespace+"/"+r.Spec.Name, "uid", r.Spec.UID, "version", r.Flintlock.Version)
		if unused := r.Flintlock.Unused; len(unused) > 0 {
			h.c.Log.Warn("some of flintlock's record has no meaning here, and is kept as it is", "uid", r.Spec.UID, "fields", strings.Join(unused, " "))
		}
	} else {
		h.c.Log.Warn("the record was lost: it is rebuilt from containerd's copy", "path", r.Dir)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keep(r, false)
	return nil
}

// copied reads our own copies of a record.
func (h *Host) copied(dir string, blobs []blob) (r record, err error) {
	for _, b := range blobs {
		r, err = decodeRecord(h.root(), b.data)
		if err == nil && r.Dir != dir {
			err = fmt.Errorf("the copy is of %s", r.Dir)
		}
		if err == nil {
			return r, nil
		}
	}
	return r, fmt.Errorf("it is lost, and containerd's copy can't be read: %w", err)
}

// translated makes our record of flintlock's newest one. The directory that flintlock
// has made can be entered by everybody, and holds what is the guest's secret.
func (h *Host) translated(dir string, blobs []blob) (record, error) {
	newest, err := newest(blobs)
	if err != nil {
		return record{}, fmt.Errorf("find flintlock's newest record in containerd: %w", err)
	}
	f, err := flintlock.Decode(newest)
	if err == nil {
		err = validPlace(f.Spec)
	}
	if err == nil && place(h.root(), f.Spec) != dir {
		err = fmt.Errorf("it is of %s", place(h.root(), f.Spec))
	}
	if err != nil {
		return record{}, fmt.Errorf("read flintlock's record in containerd: %w", err)
	}
	f.Spec.Normalize()
	f.Things.Complete(dir)
	for i, n := range f.Spec.Interfaces {
		if n.Kind == vm.Tap && n.Bridge == "" && !n.Metadata {
			f.Spec.Interfaces[i].Bridge = h.c.Bridge
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil && !errors.Is(err, os.ErrNotExist) {
		return record{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return record{
		Format: recordFormat, Spec: f.Spec, User: h.freeUser(f.Spec.UID), Dir: dir,
		Deleting: f.Deleting, DeletedAt: f.DeletedAt, Flintlock: &f.Things,
	}, nil
}

// newest is the record with the highest version. flintlock may have written two of the
// same, of which the one that says to delete must not be lost.
func newest(blobs []blob) ([]byte, error) {
	highest, found := -1, []byte(nil)
	for _, b := range blobs {
		version, err := strconv.Atoi(b.version)
		if err != nil {
			return nil, fmt.Errorf("the version %q of one is no number", b.version)
		}
		switch r, err := flintlock.Decode(b.data); {
		case version > highest, version == highest && err == nil && r.Deleting:
			highest, found = version, b.data
		}
	}
	return found, nil
}

// findStrays reports the directories of hypervisors that flintlock has started and of
// which containerd knows nothing any more.
func (h *Host) findStrays() error {
	dirs, err := flintlock.Directories(h.root())
	if err != nil {
		return err
	}
	var strays []Broken
	h.mu.Lock()
	for _, dir := range dirs {
		path := filepath.Join(dir, recordName)
		v := h.vms[filepath.Base(dir)]
		known := v != nil && v.dir == dir || slices.ContainsFunc(h.broken, func(b Broken) bool { return b.Path == path })
		if !known {
			strays = append(strays, Broken{path, errors.New("flintlock has made it, and containerd has no lease of it")})
		}
	}
	h.mu.Unlock()
	h.report(strays...)
	return nil
}

// describe adds to a status what a record says that flintlock has made.
func describe(s *vm.Status, r record) {
	s.Driver, s.Accelerator = r.Spec.Driver, "kvm" // neither of flintlock's runs without
	s.Volumes, s.KernelPath, s.InitrdPath = r.Flintlock.Volumes, r.Flintlock.Kernel, r.Flintlock.Initrd
	s.Links = map[string]vm.InterfaceStatus{}
	for _, n := range r.Spec.Interfaces {
		name := r.device(n)
		if name == "" {
			continue
		}
		l := vm.InterfaceStatus{Device: name, GuestMAC: n.MAC}
		if info, err := link.Get(name); err == nil {
			l.Index, l.MAC = info.Index, strings.ToUpper(info.MAC.String())
		}
		s.Links[n.ID] = l
	}
}

// boundLogs bounds those logs whose writers append: hypervisors of flintlock's write
// some others at a place of their own, and would leave a hole before it.
func (v *instance) boundLogs() error {
	if v.kept != nil {
		return v.host.logs.Add(v.dir, ".stdout", ".stderr")
	}
	return v.host.logs.Add(v.dir)
}

// find takes over what an earlier daemon has started. The drivers know, whatever
// was noted here.
func (v *instance) find(ctx context.Context) {
	var exit *vmm.Exit
	for _, d := range v.host.c.Drivers {
		m, err := d.Attach(ctx, v.dir)
		var ended *vmm.Ended
		switch {
		case err == nil:
			v.looked = true
			v.adopt(ctx, d, m)
			return
		case errors.As(err, &ended):
			exit = &ended.Exit
		case errdefs.IsNotFound(err):
		case ctx.Err() != nil:
			return
		default:
			v.log.Warn("look for an earlier hypervisor", "err", err)
			v.set(func(s *vm.Status) { s.Reason, s.RetryAt = err.Error(), time.Now().Add(firstDelay) })
			return
		}
	}
	v.looked = true
	v.mu.Lock()
	phase, heard, since := v.status.Phase, v.status.EndedAt, v.record.StartedAt
	v.mu.Unlock()
	switch {
	case exit != nil && !exit.At.Equal(heard) && exit.At.After(since):
		v.ended(v.ours(*exit))
	case exit == nil && (phase == vm.Running || phase == vm.Paused):
		v.ended(vmm.Exit{Cause: vmm.Unknown, Detail: "it ended while the daemon was away", At: time.Now()})
	}
	v.told = false
}

// adopt takes over a hypervisor that runs.
func (v *instance) adopt(ctx context.Context, d vmm.Driver, m vmm.Machine) {
	v.log.Info("found running", "pid", m.PID())
	if w := v.view(); w.Status.Driver == "" { // the status was lost
		links, err := v.ensureLinks(v.spec, true)
		if err != nil {
			v.log.Error("find interfaces", "err", err)
		}
		short, cancel := context.WithTimeout(ctx, askTime)
		prepared, err := v.prepare(short, unsized(v.spec))
		cancel()
		if err != nil {
			v.log.Error("find volumes", "err", err)
		}
		v.set(func(s *vm.Status) {
			s.Driver, s.Accelerator, s.Links = d.Name(), d.Facts().Accelerator, links
			s.Volumes, s.KernelPath, s.InitrdPath = prepared.Volumes, prepared.Kernel, prepared.Initrd
		})
	}
	v.running(m, v.phaseOf(ctx, m), nil)
	for _, n := range v.spec.Interfaces { // also of a daemon that guarded none
		if err := v.guard(n, true); err != nil {
			v.log.Error("guard interface", "err", err)
		}
	}
	if err := v.boundLogs(); err != nil {
		v.log.Error("bound logs", "err", err)
	}
	if v.kept != nil {
		return // its hypervisor serves the metadata itself, or has them on a disk
	}
	if err := v.serveMetadata(ctx); err != nil {
		v.log.Error("serve metadata", "err", err)
	}
}

// phaseOf is Running, unless an earlier daemon had its CPUs stand still.
func (v *instance) phaseOf(ctx context.Context, m vmm.Machine) vm.Phase {
	v.mu.Lock()
	may := v.record.Paused || v.status.Phase == vm.Paused
	v.mu.Unlock()
	if !may {
		return vm.Running
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	state, err := m.State(ctx)
	if err != nil {
		v.log.Warn("ask whether it is paused", "err", err)
	}
	if state == vmm.Paused {
		return vm.Paused
	}
	return vm.Running
}
