package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"ingot/internal/image/claim"
	"ingot/internal/vm"
)

const (
	// pullLease begins the id of the lease that holds what a pull under way has
	// fetched. What a kill has left, the next pull or daemon gives up; if none
	// comes, it expires.
	pullLease   = "ingot/pull/"
	pullExpires = time.Hour
	// giveUpTime is how long containerd may take to delete such a lease.
	giveUpTime = 10 * time.Second
)

// image is what there is to know of one, by its digest; it never changes.
type image struct {
	name    string
	chain   string // the id of its committed snapshot, in every snapshotter
	process vm.Process
}

// Policy says when a registry is asked for an image.
type Policy string

// The policies. The zero value is Always for the tag latest, which moves, and
// Missing for all others.
const (
	Always  Policy = "always"
	Missing Policy = "missing" // only if it is not here
	Never   Policy = "never"   // it must be here
)

// Pull fetches an image and unpacks it for volumes, also if an older one of
// this name is there and the policy says so.
func (s *Store) Pull(ctx context.Context, ref string, policy Policy, progress func(Progress)) error {
	name, err := s.Resolve(ref)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	if policy == "" {
		policy = Missing
		if strings.HasSuffix(name, ":latest") {
			policy = Always
		}
	}
	switch policy {
	case Always:
	case Missing, Never:
		_, err := s.read(ctx, name)
		switch {
		case !errdefs.IsNotFound(err):
			return err
		case policy == Never:
			return fmt.Errorf("image %s is not here, and is not to be pulled: %w", name, errdefs.ErrNotFound)
		}
	default:
		return fmt.Errorf("pull policy %q is none of always, missing, never: %w", policy, errdefs.ErrInvalidArgument)
	}
	return s.answering(ctx, func(ctx context.Context) error {
		if err := s.fetchOnce(ctx, name, blockfile, progress); err != nil {
			return fmt.Errorf("pull image %s: %w", name, meaning(err))
		}
		_, err := s.read(ctx, name) // registries have charts and the like, too
		return err
	})
}

// Pulling says how many images are being pulled or unpacked, how many wait for a place,
// and how many microVMs and clients wait for either.
func (s *Store) Pulling() (pulls, queued, waiting int) {
	for _, p := range []*places{s.pullPlaces, s.unpackPlaces} {
		p.mu.Lock()
		pulls, queued = pulls+p.sum, queued+len(p.queue)
		p.mu.Unlock()
	}
	return pulls, queued, s.pulls.waiters()
}

// ensure returns an image that is here, unpacked for a snapshotter. It asks no
// registry if that is so already.
func (s *Store) ensure(ctx context.Context, ref, snapshotter string, progress func(Progress)) (image, error) {
	name, err := s.Resolve(ref)
	if err != nil {
		return image{}, err
	}
	i, err := s.find(ctx, name, snapshotter)
	if !errdefs.IsNotFound(err) {
		return i, err
	}
	if err := s.get(ctx, name, snapshotter, progress); err != nil {
		return image{}, err
	}
	return s.find(ctx, name, snapshotter)
}

// get makes an image be here, by unpacking it where only that is missing.
func (s *Store) get(ctx context.Context, name, snapshotter string, progress func(Progress)) error {
	err := s.unpackOnce(ctx, name, snapshotter)
	if errdefs.IsNotFound(err) {
		err = s.fetchOnce(ctx, name, snapshotter, progress)
	}
	if err != nil {
		return fmt.Errorf("pull image %s: %w", name, meaning(err))
	}
	return nil
}

// fetchOnce fetches an image for everyone who asks for it meanwhile: who ends
// first would give up the lease that holds what the others fetch.
func (s *Store) fetchOnce(ctx context.Context, name, snapshotter string, progress func(Progress)) error {
	return s.pulls.do(ctx, name+" "+snapshotter, progress, func(ctx context.Context, tell func(Progress)) error {
		registry, _, _ := strings.Cut(name, "/")
		give, err := s.pullPlaces.take(ctx, registry, func() { tell(Progress{Image: name, Status: "queue"}) })
		if err != nil {
			return err
		}
		defer give()
		return s.fetch(ctx, name, snapshotter, tell)
	})
}

// unpackOnce unpacks an image for everyone who asks for it meanwhile.
func (s *Store) unpackOnce(ctx context.Context, name, snapshotter string) error {
	return s.pulls.do(ctx, "unpack "+name+" "+snapshotter, nil, func(ctx context.Context, tell func(Progress)) error {
		give, err := s.unpackPlaces.take(ctx, "", func() { tell(Progress{Image: name, Status: "queue"}) })
		if err != nil {
			return err
		}
		defer give()
		return s.unpack(ctx, name, snapshotter)
	})
}

// unpack unpacks an image whose content is here; errdefs.ErrNotFound means that
// it, or a part of it, is not.
func (s *Store) unpack(ctx context.Context, name, snapshotter string) (err error) {
	record, err := s.client.ImageService().Get(ctx, name)
	if err != nil {
		return err
	}
	ctx, giveUp, err := s.leaseForPull(ctx, "unpack "+name+" "+snapshotter)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, giveUp(err)) }()
	return s.withRoom(snapshotter, func(room snapshots.Opt) error {
		return client.NewImage(s.client, record).Unpack(ctx, snapshotter, func(_ context.Context, c *client.UnpackConfig) error {
			c.SnapshotOpts = append(c.SnapshotOpts, room)
			return nil
		})
	})
}

// withRoom unpacks an image, and where it is larger than a volume, again with
// more room: what it will take is not known before.
func (s *Store) withRoom(snapshotter string, unpack func(room snapshots.Opt) error) error {
	times := 1
	for {
		err := unpack(snapshots.WithLabels(map[string]string{claim.RoomLabel: strconv.Itoa(times)}))
		if err == nil || snapshotter != blockfile || !isFull(err) || times >= claim.MostRoom {
			return err
		}
		times *= 4
		s.c.Log.Info("image does not fit into a volume, unpack again", "times", times)
	}
}

// find returns an image that is here and unpacked, or errdefs.ErrNotFound.
func (s *Store) find(ctx context.Context, name, snapshotter string) (image, error) {
	i, err := s.read(ctx, name)
	if err != nil {
		return image{}, err
	}
	if _, err := s.client.SnapshotService(snapshotter).Stat(ctx, i.chain); err != nil {
		return image{}, fmt.Errorf("find image %s: %w", name, err)
	}
	return i, nil
}

// read reads an image's configuration, which is what its digest says and
// therefore kept.
func (s *Store) read(ctx context.Context, name string) (image, error) {
	record, err := s.client.ImageService().Get(ctx, name)
	if err != nil {
		return image{}, fmt.Errorf("read image %s: %w", name, err)
	}
	if err := s.markUsed(ctx, record); err != nil {
		return image{}, fmt.Errorf("read image %s: %w", name, err)
	}
	s.mu.Lock()
	i, ok := s.known[record.Target.Digest]
	s.mu.Unlock()
	i.name = name
	if ok {
		return i, nil
	}
	if err := s.readConfig(ctx, record, &i); err != nil {
		return image{}, fmt.Errorf("read image %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[record.Target.Digest] = i
	return i, nil
}

func (s *Store) readConfig(ctx context.Context, record images.Image, i *image) error {
	found := client.NewImage(s.client, record)
	at, err := found.Config(ctx)
	if err != nil {
		return err
	}
	data, err := content.ReadBlob(ctx, s.client.ContentStore(), at)
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("decode configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(config.RootFS.DiffIDs) == 0 {
		return fmt.Errorf("it has no layers to boot from: %w", errdefs.ErrInvalidArgument)
	}
	i.chain = identity.ChainID(slices.Clone(config.RootFS.DiffIDs)).String()
	i.process = process(config.Config)
	return nil
}

func process(c ocispec.ImageConfig) vm.Process {
	p := vm.Process{Entrypoint: c.Entrypoint, Args: c.Cmd, Dir: c.WorkingDir, User: c.User, StopSignal: c.StopSignal}
	for _, e := range c.Env {
		if p.Env == nil {
			p.Env = map[string]string{}
		}
		k, v, _ := strings.Cut(e, "=")
		p.Env[k] = v
	}
	return p
}

// fetch asks the registry for what a name means now, and gets what is missing
// of that.
func (s *Store) fetch(ctx context.Context, name, snapshotter string, tell func(Progress)) (err error) {
	start := time.Now()
	ctx, giveUp, err := s.leaseForPull(ctx, name+" "+snapshotter)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, giveUp(err)) }()
	t, err := s.transport()
	if err != nil {
		return err
	}
	defer t.CloseIdleConnections()
	m := &meter{tell: tell, progress: Progress{Image: name, Status: "resolve"}}
	m.add(0, 0, "resolve")
	resolver, err := s.resolver(t, func(n int64) { m.add(n, 0, "pull") })
	if err != nil {
		return err
	}
	err = s.withRoom(snapshotter, func(room snapshots.Opt) error {
		_, err := s.client.Pull(ctx, name,
			client.WithResolver(resolver),
			client.WithImageHandlerWrapper(m.watch),
			client.WithPullLabel(usedLabel, now()),
			client.WithPullUnpack,
			client.WithPullSnapshotter(snapshotter, room))
		return err
	})
	if err != nil {
		return err
	}
	m.add(0, 0, "done")
	s.c.Log.Info("image pulled", "image", name, "snapshotter", snapshotter, "bytes", m.progress.Offset, "took", time.Since(start))
	return nil
}

// leaseForPull holds what is fetched until the image's own record does, or the
// pull has failed or was cancelled.
func (s *Store) leaseForPull(ctx context.Context, what string) (leased context.Context, giveUp func(error) error, err error) {
	// Each try has its own: one that was cancelled may end while the next is at work.
	id := pullLease + strings.ReplaceAll(what, " ", "/") + "/" + rand.Text()
	s.mu.Lock()
	s.pulling[id] = true
	s.mu.Unlock()
	giveUp = func(failed error) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTime)
		defer cancel()
		s.mu.Lock()
		delete(s.pulling, id)
		s.mu.Unlock()
		if failed == nil {
			return s.deletePull(ctx, id)
		}
		// Now, since the next try would go on with what came, whatever that was.
		return s.deletePull(ctx, id, leases.SynchronousDelete)
	}
	if err := s.sweepPulls(ctx); err != nil {
		return nil, nil, errors.Join(err, giveUp(err))
	}
	if _, err = s.client.LeasesService().Create(ctx, leases.WithID(id), leases.WithExpiration(pullExpires)); err != nil {
		return nil, nil, errors.Join(err, giveUp(err))
	}
	return leases.WithLease(ctx, id), giveUp, nil
}

func (s *Store) deletePull(ctx context.Context, id string, opts ...leases.DeleteOpt) error {
	err := s.client.LeasesService().Delete(ctx, leases.Lease{ID: id}, opts...)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("give up what was pulled: %w", err)
	}
	return nil
}

// sweepPulls gives up what was being pulled by a daemon, or into a containerd, that
// was killed.
func (s *Store) sweepPulls(ctx context.Context) error {
	list, err := s.client.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range list {
		s.mu.Lock()
		live := s.pulling[l.ID]
		s.mu.Unlock()
		if strings.HasPrefix(l.ID, pullLease) && !live {
			s.c.Log.Info("give up what was being pulled", "lease", l.ID)
			err = errors.Join(err, s.deletePull(ctx, l.ID))
		}
	}
	return err
}

// meter adds up a pull's progress and passes it on, not oftener than anyone
// could read it.
type meter struct {
	mu       sync.Mutex // guards what follows; held while telling, so that the order is kept
	progress Progress
	seen     map[digest.Digest]bool
	told     time.Time
	tell     func(Progress)
}

func (m *meter) add(offset, total int64, status string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh := status != m.progress.Status || m.told.IsZero()
	m.progress.Offset += offset
	m.progress.Total += total
	m.progress.Status = status
	if m.progress.Total > 0 && m.progress.Offset >= m.progress.Total && status == "pull" {
		m.progress.Status = "unpack"
		fresh = true
	}
	if fresh || time.Since(m.told) > 100*time.Millisecond {
		m.told = time.Now()
		m.tell(m.progress)
	}
}

// watch sees each part of an image before it is fetched.
func (m *meter) watch(h images.Handler) images.Handler {
	return images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if m.isNew(d.Digest) {
			m.add(0, d.Size, "pull")
		}
		return h.Handle(ctx, d)
	})
}

func (m *meter) isNew(d digest.Digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen[d] {
		return false
	}
	if m.seen == nil {
		m.seen = map[digest.Digest]bool{}
	}
	m.seen[d] = true
	return true
}
