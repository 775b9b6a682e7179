package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"

	"ingot/internal/vm"
)

// Held is an image that is here.
type Held struct {
	Name   string
	Digest string
	Size   int64     // of what was pulled
	Used   time.Time // when a microVM was last prepared from it, or it was pulled
	VMs    []string  // uids of the microVMs whose specs name it, running or not
}

// usedLabel on an image says when it was last used. It is written again only
// when it is older than usedEvery: each write is one to disk.
const (
	usedLabel = "ingot/used"
	usedEvery = time.Hour
)

func now() string { return time.Now().UTC().Format(time.RFC3339) }

func usedAt(i images.Image) time.Time {
	if t, err := time.Parse(time.RFC3339, i.Labels[usedLabel]); err == nil {
		return t
	}
	return i.UpdatedAt // from elsewhere, by ctr for one
}

func (s *Store) markUsed(ctx context.Context, i images.Image) error {
	if time.Since(usedAt(i)) < usedEvery {
		return nil
	}
	i.Labels = map[string]string{usedLabel: now()}
	_, err := s.client.ImageService().Update(ctx, i, "labels."+usedLabel)
	return err
}

// Images lists the images that are here, in the order of their names; vms are
// the microVMs that may use them. One goes by the name in its spec: that is what
// its next start asks for, whatever other names the same layers have.
func (s *Store) Images(ctx context.Context, vms []vm.Spec) ([]Held, error) {
	users := s.users(vms)
	var list []Held
	err := s.answering(ctx, func(ctx context.Context) error {
		records, err := s.client.ImageService().List(ctx)
		for _, r := range records {
			h := Held{Name: r.Name, Digest: r.Target.Digest.String(), Used: usedAt(r), VMs: users[r.Name]}
			if h.Size, err = s.size(ctx, r); err != nil {
				return err
			}
			list = append(list, h)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	slices.SortFunc(list, func(a, b Held) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// size is that of the parts which are here.
func (s *Store) size(ctx context.Context, i images.Image) (int64, error) {
	size, err := i.Size(ctx, s.client.ContentStore(), platforms.Default())
	if errdefs.IsNotFound(err) {
		return i.Target.Size, nil
	}
	return size, err
}

// users are the uids of the microVMs that use an image, by its name.
func (s *Store) users(vms []vm.Spec) map[string][]string {
	users := map[string][]string{}
	for _, v := range vms {
		refs := []string{v.Kernel.Image, v.Root.Image}
		if v.Initrd != nil {
			refs = append(refs, v.Initrd.Image)
		}
		for _, volume := range v.Volumes {
			refs = append(refs, volume.Image)
		}
		for _, ref := range refs {
			name, err := s.Resolve(ref)
			if err == nil && !slices.Contains(users[name], v.UID) {
				users[name] = append(users[name], v.UID)
			}
		}
	}
	for _, uids := range users {
		slices.Sort(uids)
	}
	return users
}

// Remove deletes images, and returns when what only they held is gone. If a
// microVM uses one of them, none is deleted.
func (s *Store) Remove(ctx context.Context, vms []vm.Spec, refs ...string) ([]Held, error) {
	here, err := s.Images(ctx, vms)
	if err != nil {
		return nil, fmt.Errorf("remove images: %w", err)
	}
	var chosen []Held
	var mistakes []error
	for _, ref := range refs {
		name, err := s.Resolve(ref)
		i := slices.IndexFunc(here, func(h Held) bool { return h.Name == name })
		switch {
		case err != nil:
			mistakes = append(mistakes, err)
		case i < 0:
			mistakes = append(mistakes, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound))
		case len(here[i].VMs) > 0:
			mistakes = append(mistakes, fmt.Errorf("image %s is used by %s: %w", name, strings.Join(here[i].VMs, ", "), errdefs.ErrFailedPrecondition))
		default:
			chosen = append(chosen, here[i])
		}
	}
	if len(mistakes) > 0 {
		return nil, fmt.Errorf("remove images: %w", errors.Join(mistakes...))
	}
	return chosen, s.delete(ctx, chosen)
}

// Prune deletes the images that no microVM uses and that were not used since.
func (s *Store) Prune(ctx context.Context, vms []vm.Spec, since time.Time) ([]Held, error) {
	here, err := s.Images(ctx, vms)
	if err != nil {
		return nil, fmt.Errorf("remove unused images: %w", err)
	}
	unused := slices.DeleteFunc(here, func(h Held) bool { return len(h.VMs) > 0 || h.Used.After(since) })
	return unused, s.delete(ctx, unused)
}

// delete deletes images; with the last one goes what only they held.
func (s *Store) delete(ctx context.Context, list []Held) error {
	for n, h := range list {
		var opts []images.DeleteOpt
		if n == len(list)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := s.client.ImageService().Delete(ctx, h.Name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove image %s: %w", h.Name, err)
		}
		s.c.Log.Info("image removed", "image", h.Name, "bytes", h.Size)
	}
	return nil
}

// ContentBytes is what containerd holds of pulled images.
func (s *Store) ContentBytes(ctx context.Context) (int64, error) {
	var sum int64
	err := s.client.ContentStore().Walk(ctx, func(i content.Info) error { sum += i.Size; return nil })
	if err != nil {
		return 0, fmt.Errorf("list content: %w", err)
	}
	return sum, nil
}
