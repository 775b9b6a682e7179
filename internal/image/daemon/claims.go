package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"

	"ingot/internal/image/claim"
)

// claims makes leases and snapshots in one transaction of containerd's
// database, with containerd's own code: its calls use the transaction that is
// in their context, where there is one.
//
// They are called on a second metadata.DB, over the same database and the same
// snapshotters. The first one's snapshotters have locks that their callers take
// before they begin a transaction; taking them inside one could wait for a
// caller that waits for the transaction. What those locks are for, that the
// garbage collector does not remove a snapshot that is being made,
// blockfile.Remove ensures.
type claims struct {
	db     *metadata.DB
	inside *metadata.DB
	leases leases.Manager // of inside
	blocks *blockfile

	turn  sync.Mutex // held over a transaction: bbolt has one at a time anyway
	mu    sync.Mutex // guards queue
	queue []*waiting
}

func registerClaims() {
	registry.Register(&plugin.Registration{
		Type:     plugins.GRPCPlugin,
		ID:       "claims",
		Requires: []plugin.Type{plugins.MetadataPlugin, plugins.SnapshotPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			db, err := ic.GetSingle(plugins.MetadataPlugin)
			if err != nil {
				return nil, err
			}
			blocks, err := ic.GetByID(plugins.SnapshotPlugin, "blockfile")
			if err != nil {
				return nil, err
			}
			return newClaims(ic.Context, db.(*metadata.DB), blocks.(*blockfile))
		},
	})
}

func newClaims(ctx context.Context, db *metadata.DB, blocks *blockfile) (*claims, error) {
	inside := metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{"blockfile": claiming{blocks}})
	c := &claims{db: db, inside: inside, leases: metadata.NewLeaseManager(inside), blocks: blocks}
	blocks.alive = func(key string) bool { return has(db, key) }
	return c, c.sweep(ctx)
}

// Register adds the claims to containerd's own services.
func (c *claims) Register(s *grpc.Server) error {
	claim.Register(s, c)
	return nil
}

// Make implements claim.Maker.
func (c *claims) Make(ctx context.Context, r claim.Request) (claim.Response, error) {
	if _, err := namespaces.NamespaceRequired(ctx); err != nil {
		return claim.Response{}, err
	}
	for _, s := range r.Snapshots {
		if c.inside.Snapshotter(s.Snapshotter) == nil {
			return claim.Response{}, fmt.Errorf("snapshotter %q makes no claims: %w", s.Snapshotter, errdefs.ErrInvalidArgument)
		}
	}
	if out, ok := c.look(ctx, r); ok {
		return out, nil
	}
	return c.make(ctx, r)
}

// look answers a claim that was made before, without a transaction to commit.
func (c *claims) look(ctx context.Context, r claim.Request) (out claim.Response, ok bool) {
	ok = true
	out.Paths = map[string]string{}
	err := c.db.View(func(tx *bolt.Tx) error {
		ctx := boltutil.WithTransaction(ctx, tx)
		held, err := c.leases.ListResources(ctx, leases.Lease{ID: r.Lease})
		if err != nil {
			return err
		}
		have := map[claim.Resource]bool{}
		for _, h := range held {
			have[claim.Resource{Type: h.Type, ID: h.ID}] = true
		}
		for _, k := range r.Keep {
			ok = ok && have[k]
		}
		for _, s := range r.Snapshots {
			ok = ok && have[claim.Resource{Type: "snapshots/" + s.Snapshotter, ID: s.Key}]
			mounts, err := c.inside.Snapshotter(s.Snapshotter).Mounts(ctx, s.Key)
			if err != nil {
				return err
			}
			out.Paths[s.Key] = mounts[0].Source
		}
		return nil
	})
	return out, ok && err == nil
}

// waiting is a claim that somebody waits for.
type waiting struct {
	ctx     context.Context // its caller's, for the namespace
	request claim.Request
	out     claim.Response
	err     error
	done    bool
}

// make puts the claim in the queue and waits for its turn. Whoever's turn it is
// makes all that wait, in one transaction: sixteen at once sync as often as one.
func (c *claims) make(ctx context.Context, r claim.Request) (claim.Response, error) {
	w := &waiting{ctx: ctx, request: r}
	c.mu.Lock()
	c.queue = append(c.queue, w)
	c.mu.Unlock()
	c.turn.Lock()
	defer c.turn.Unlock()
	if w.done {
		return w.out, w.err
	}
	c.mu.Lock()
	batch := c.queue
	c.queue = nil
	c.mu.Unlock()
	if err := c.makeAll(batch); err != nil && len(batch) > 1 {
		// The transaction undid all for the sake of one.
		for _, w := range batch {
			c.makeAll([]*waiting{w})
		}
	}
	return w.out, w.err
}

// makeAll makes claims in one transaction: all of them, or none.
func (c *claims) makeAll(batch []*waiting) error {
	var made []string
	err := c.db.Update(func(tx *bolt.Tx) (err error) {
		for _, w := range batch {
			// A daemon that was killed may be followed by one that has given the lease
			// up before it is this claim's turn: what was made then would stay.
			if w.err = context.Cause(w.ctx); w.err != nil {
				continue
			}
			if w.out, err = c.fill(boltutil.WithTransaction(w.ctx, tx), w.request); err != nil {
				break
			}
		}
		// Only one transaction is under way at any time, so what was made and is
		// not decided is this one's.
		made = c.blocks.takeUndecided()
		return err
	})
	if err != nil {
		c.blocks.undo(made)
	}
	c.blocks.settle(made)
	for _, w := range batch {
		w.done, w.err = true, errors.Join(w.err, err)
	}
	return err
}

func (c *claims) fill(ctx context.Context, r claim.Request) (claim.Response, error) {
	_, err := c.leases.Create(ctx, leases.WithID(r.Lease), leases.WithLabels(r.Labels))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return claim.Response{}, err
	}
	for _, k := range r.Keep {
		if err := c.leases.AddResource(ctx, leases.Lease{ID: r.Lease}, leases.Resource{ID: k.ID, Type: k.Type}); err != nil {
			return claim.Response{}, err
		}
	}
	ctx = leases.WithLease(ctx, r.Lease)
	out := claim.Response{Paths: map[string]string{}}
	for _, s := range r.Snapshots {
		mounts, err := ensure(ctx, c.inside.Snapshotter(s.Snapshotter), s)
		if err != nil {
			return claim.Response{}, err
		}
		out.Paths[s.Key] = mounts[0].Source
	}
	return out, nil
}

// ensure makes a snapshot, or finds it. One that the database has and the
// snapshotter has not was lost in a power failure, before anything was written
// to it, and is made again.
func ensure(ctx context.Context, sn snapshots.Snapshotter, s claim.Snapshot) ([]mount.Mount, error) {
	mounts, err := sn.Prepare(ctx, s.Key, s.Parent, snapshots.WithLabels(s.Labels))
	if !errdefs.IsAlreadyExists(err) {
		return mounts, err
	}
	if mounts, err = sn.Mounts(ctx, s.Key); !errdefs.IsNotFound(err) {
		return mounts, err
	}
	log.G(ctx).WithField("key", s.Key).Warn("snapshot was lost before its first write, making it again")
	if err := sn.Remove(ctx, s.Key); err != nil {
		return nil, err
	}
	return sn.Prepare(ctx, s.Key, s.Parent, snapshots.WithLabels(s.Labels))
}

// sweep removes the files of claims whose transaction a crash undid.
func (c *claims) sweep(ctx context.Context) error {
	list := c.blocks.all()
	for i := len(list) - 1; i >= 0; i-- { // children before parents
		err := c.blocks.Remove(ctx, list[i].Name)
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

// has tells whether the database has a snapshot under the key that it gives
// snapshotters: NAMESPACE/NUMBER/NAME. The layout is documented in core/metadata.
func has(db *metadata.DB, key string) bool {
	ns, rest, _ := strings.Cut(key, "/")
	_, name, _ := strings.Cut(rest, "/")
	found := false
	err := db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, step := range []string{ns, "snapshots", "blockfile", name} {
			if b == nil || step == "" {
				return nil
			}
			b = b.Bucket([]byte(step))
		}
		found = b != nil && string(b.Get([]byte("name"))) == key
		return nil
	})
	return found || err != nil // when in doubt, it is in use
}

// claiming is the blockfile snapshotter inside a claim's transaction: what it
// makes stays claimed until the transaction is decided.
type claiming struct{ *blockfile }

func (c claiming) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	c.mu.Lock()
	c.claimed[key] = true
	c.undecided = append(c.undecided, key)
	c.mu.Unlock()
	return c.blockfile.Prepare(ctx, key, parent, opts...)
}

func (b *blockfile) takeUndecided() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	made := b.undecided
	b.undecided = nil
	return made
}

func (b *blockfile) settle(keys []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range keys {
		delete(b.claimed, k)
	}
}

// undo removes what a transaction made that was not committed. What cannot be
// removed now is swept at the next start.
func (b *blockfile) undo(keys []string) {
	for _, k := range keys {
		e, err := b.find(k)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err := errors.Join(err, b.remove(e)); err != nil {
			log.L.WithError(err).WithField("key", k).Warn("undo claim")
		}
	}
}
