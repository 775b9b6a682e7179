package image

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"ingot/internal/image/claim"
	"ingot/internal/pool"
	"ingot/internal/vm"
)

// Prepare gets what a microVM needs, and holds it by the lease until Release.
// It may be repeated with the same lease, and then finds what it made; volumes
// keep what was written to them. Images that are here are used as they are,
// without asking a registry.
func (s *Store) Prepare(ctx context.Context, lease string, r Request, progress func(Progress)) (Prepared, error) {
	var p Prepared
	err := s.answering(ctx, func(ctx context.Context) (err error) {
		p, err = s.prepare(ctx, lease, r, progress)
		if errdefs.IsNotFound(err) { // an image was removed between being found and being claimed
			p, err = s.prepare(ctx, lease, r, progress)
		}
		return err
	})
	if err != nil {
		return Prepared{}, fmt.Errorf("prepare %s: %w", lease, err)
	}
	return p, nil
}

func (s *Store) prepare(ctx context.Context, lease string, r Request, progress func(Progress)) (Prepared, error) {
	volumes, err := r.volumes()
	if err != nil {
		return Prepared{}, err
	}
	found, err := s.ensureAll(ctx, r, volumes, progress)
	if err != nil {
		return Prepared{}, err
	}
	p := Prepared{Volumes: map[string]string{}, Process: found[want{r.Root.Image, blockfile}].process}
	if p.Kernel, err = s.file(ctx, "kernel", found[want{r.Kernel.Image, native}], r.Kernel.Path); err != nil {
		return Prepared{}, err
	}
	if r.Initrd != nil {
		if p.Initrd, err = s.file(ctx, "initrd", found[want{r.Initrd.Image, native}], r.Initrd.Path); err != nil {
			return Prepared{}, err
		}
	}
	out, err := s.claim(ctx, request(lease, volumes, found))
	if err != nil {
		return Prepared{}, err
	}
	for _, v := range volumes {
		path := out.Paths[lease+"/"+v.ID]
		if v.Size > 0 && !v.ReadOnly {
			if err := pool.Grow(ctx, path, v.Size); err != nil {
				return Prepared{}, fmt.Errorf("grow volume %s: %w", v.ID, err)
			}
		}
		p.Volumes[v.ID] = path
	}
	return p, nil
}

// volumes are those that are made from images, the root first. Directories that
// are shared with the host are not this package's.
func (r Request) volumes() ([]vm.Volume, error) {
	var list []vm.Volume
	ids := map[string]bool{}
	for _, v := range append([]vm.Volume{r.Root}, r.Volumes...) {
		if v.VirtioFS != "" {
			continue
		}
		switch {
		case v.ID == "" || strings.ContainsRune(v.ID, '/'):
			return nil, fmt.Errorf("volume id %q is not valid: %w", v.ID, errdefs.ErrInvalidArgument)
		case ids[v.ID]:
			return nil, fmt.Errorf("volume id %s is used twice: %w", v.ID, errdefs.ErrInvalidArgument)
		case v.Image == "":
			return nil, fmt.Errorf("volume %s has no image: %w", v.ID, errdefs.ErrInvalidArgument)
		}
		ids[v.ID] = true
		list = append(list, v)
	}
	return list, nil
}

// want is an image, and how it is to be unpacked.
type want struct{ image, snapshotter string }

// ensureAll gets all images of a request, at the same time.
func (s *Store) ensureAll(ctx context.Context, r Request, volumes []vm.Volume, progress func(Progress)) (map[want]image, error) {
	wants := map[want]*image{{r.Kernel.Image, native}: {}}
	if r.Initrd != nil {
		wants[want{r.Initrd.Image, native}] = new(image)
	}
	for _, v := range volumes {
		wants[want{v.Image, blockfile}] = new(image)
	}
	all, ctx := errgroup.WithContext(ctx)
	for w, i := range wants {
		all.Go(func() (err error) {
			*i, err = s.ensure(ctx, w.image, w.snapshotter, progress)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	found := map[want]image{}
	for w, i := range wants {
		found[w] = *i
	}
	return found, nil
}

func request(lease string, volumes []vm.Volume, found map[want]image) claim.Request {
	r := claim.Request{Lease: lease}
	owner := strings.TrimPrefix(lease, "flintlock/")
	for _, v := range volumes {
		r.Snapshots = append(r.Snapshots, claim.Snapshot{
			Snapshotter: blockfile,
			Key:         lease + "/" + v.ID,
			Parent:      found[want{v.Image, blockfile}].chain,
			Labels:      map[string]string{"flintlock/owner": owner, "flintlock/owner-usage": v.ID},
		})
	}
	for w, i := range found {
		if w.snapshotter == native {
			r.Keep = append(r.Keep, claim.Resource{Type: "snapshots/" + native, ID: i.chain})
		}
	}
	return r
}

// claim asks our own containerd for everything at once, and any other step by step.
func (s *Store) claim(ctx context.Context, r claim.Request) (claim.Response, error) {
	out, err := claim.Make(ctx, s.conn, r)
	if errdefs.IsNotImplemented(err) {
		return s.claimPlainly(ctx, r)
	}
	return out, err
}

func (s *Store) claimPlainly(ctx context.Context, r claim.Request) (claim.Response, error) {
	lm := s.client.LeasesService()
	if _, err := lm.Create(ctx, leases.WithID(r.Lease)); err != nil && !errdefs.IsAlreadyExists(err) {
		return claim.Response{}, err
	}
	for _, k := range r.Keep {
		if err := lm.AddResource(ctx, leases.Lease{ID: r.Lease}, leases.Resource{ID: k.ID, Type: k.Type}); err != nil {
			return claim.Response{}, err
		}
	}
	ctx = leases.WithLease(ctx, r.Lease)
	out := claim.Response{Paths: map[string]string{}}
	for _, want := range r.Snapshots {
		sn := s.client.SnapshotService(want.Snapshotter)
		mounts, err := sn.Prepare(ctx, want.Key, want.Parent, snapshots.WithLabels(want.Labels))
		if errdefs.IsAlreadyExists(err) {
			mounts, err = sn.Mounts(ctx, want.Key)
		}
		if err != nil {
			return claim.Response{}, err
		}
		out.Paths[want.Key] = mounts[0].Source
	}
	return out, nil
}

// file is the path of an image's file, in the directory that all microVMs with
// this image share. The lease holds the directory, there is no copy. use is what
// the file is for, as the API names it.
func (s *Store) file(ctx context.Context, use string, i image, path string) (string, error) {
	dir, err := s.dir(ctx, i.chain)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", i.name, err)
	}
	found, err := inRoot(dir, path)
	if errdefs.IsInvalidArgument(err) {
		return "", &vm.FieldError{Field: use + ".filename", Problem: fmt.Sprintf("image %s has no file %q", i.name, path)}
	}
	if err != nil {
		return "", fmt.Errorf("image %s: file %q: %w", i.name, path, err)
	}
	return found, nil
}

// dir is the directory of a committed native snapshot.
func (s *Store) dir(ctx context.Context, chain string) (string, error) {
	if dir, ok := s.knownDir(chain); ok {
		return dir, nil
	}
	err := s.looks.do(ctx, chain, nil, func(ctx context.Context, _ func(Progress)) error { return s.look(ctx, chain) })
	if err != nil {
		return "", err
	}
	dir, _ := s.knownDir(chain)
	return dir, nil
}

func (s *Store) knownDir(chain string) (string, bool) {
	s.mu.Lock()
	dir, ok := s.dirs[chain]
	s.mu.Unlock()
	if !ok {
		return "", false
	}
	_, err := os.Stat(dir)
	return dir, err == nil
}

// look learns a committed snapshot's directory. containerd tells it only for a
// view, so there is one for a moment.
func (s *Store) look(ctx context.Context, chain string) error {
	sn := s.client.SnapshotService(native)
	key := "ingot/look/" + chain
	mounts, err := sn.View(ctx, key, chain)
	if errdefs.IsAlreadyExists(err) { // from a predecessor that was killed
		mounts, err = sn.Mounts(ctx, key)
	}
	if err != nil {
		return err
	}
	if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirs[chain] = mounts[0].Source
	return nil
}
