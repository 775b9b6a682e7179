// Package image turns OCI references into what a microVM boots from: a kernel
// file, an initrd, block devices. It owns the leases that hold them in
// containerd, one per microVM, and pulls what is missing. It does not run
// containerd (package daemon does) and does not build images.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"ingot/internal/vm"
)

// The snapshotters: volumes are block devices, kernels are files.
const (
	blockfile = "blockfile"
	native    = "native"
)

// DefaultNamespace is the containerd namespace that flintlock uses.
const DefaultNamespace = "flintlock"

// Config says which containerd and which registry.
type Config struct {
	Socket    string
	Namespace string // empty: DefaultNamespace
	Registry  string // host:port that short names mean; empty: there are none
	CAFile    string // certificates trusted beside the system's; read at each pull
	// Credentials is a file in the form of docker's config.json, read at each pull;
	// one that is not there has none.
	Credentials string
	Log         *slog.Logger
}

// Store is one containerd, seen as a source of kernels and volumes.
type Store struct {
	c      Config
	client *client.Client
	conn   *grpc.ClientConn // the client's
	pulls  flight
	looks  flight
	silent atomic.Bool   // containerd did not answer when it was asked last
	turned chan struct{} // that has changed

	pullPlaces, unpackPlaces *places
	patience                 patience // with registries

	mu      sync.Mutex // guards what follows
	known   map[digest.Digest]image
	dirs    map[string]string    // of committed native snapshots, by chain id
	pulling map[string]bool      // the leases of pulls under way
	right   map[string]time.Time // until when requests that were found right are
}

// Request is what one microVM needs.
type Request struct {
	Kernel  vm.File
	Initrd  *vm.File
	Root    vm.Volume
	Volumes []vm.Volume
}

// Prepared is what it got.
type Prepared struct {
	Kernel, Initrd string            // paths; Initrd is empty where none was asked for
	Volumes        map[string]string // volume id to the path of a raw disk
	Process        vm.Process        // what the root image says it runs
}

// Progress is how far a pull is. Total is 0 while it is not known, and grows
// as the image's parts are discovered.
type Progress struct {
	Image  string // the full reference
	Status string // resolve, pull, unpack, done
	Offset int64
	Total  int64
}

// Open connects to containerd and waits until it answers, or ctx ends. The
// namespace is this store's alone: pulls that are under way in it are a
// predecessor's, and given up.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.Namespace == "" {
		c.Namespace = DefaultNamespace
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		turned: make(chan struct{}, 1),
		c:      c, known: map[digest.Digest]image{}, dirs: map[string]string{}, right: map[string]time.Time{}, pulling: map[string]bool{},
		pullPlaces: newPlaces(mostPulls, mostPullsEach), unpackPlaces: newUnpacks(), patience: usualPatience,
	}
	if err := s.connect(ctx); err != nil {
		return nil, fmt.Errorf("open containerd %s: %w", c.Socket, err)
	}
	if err := s.sweepPulls(ctx); err != nil {
		s.client.Close()
		return nil, fmt.Errorf("open containerd %s: %w", c.Socket, err)
	}
	return s, nil
}

// Close ends the pulls under way and the connection.
func (s *Store) Close() error {
	s.pulls.close()
	s.looks.close()
	return s.client.Close()
}

// Resolve completes a reference: a short name gets the environment's registry,
// and what has neither tag nor digest gets the tag latest.
func (s *Store) Resolve(ref string) (string, error) {
	if ref == "" {
		return "", fmt.Errorf("image reference is empty: %w", errdefs.ErrInvalidArgument)
	}
	full := ref
	if host, _, found := strings.Cut(ref, "/"); !found || !strings.ContainsAny(host, ".:") && host != "localhost" {
		if s.c.Registry == "" {
			return "", fmt.Errorf("image %s names no registry, and there is no default one: %w", ref, errdefs.ErrInvalidArgument)
		}
		full = path.Join(s.c.Registry, ref)
	}
	named, err := reference.ParseNamed(full)
	if err != nil {
		return "", fmt.Errorf("image %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return reference.TagNameOnly(named).String(), nil
}

// Release gives up a lease and returns when all that only it held is gone. One
// that does not exist is no error.
func (s *Store) Release(ctx context.Context, lease string) error {
	err := s.answering(ctx, func(ctx context.Context) error {
		return s.client.LeasesService().Delete(ctx, leases.Lease{ID: lease}, leases.SynchronousDelete)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("release %s: %w", lease, err)
	}
	return nil
}

// Leases lists the ids of all leases that microVMs hold.
func (s *Store) Leases(ctx context.Context) ([]string, error) {
	var list []leases.Lease
	err := s.answering(ctx, func(ctx context.Context) (err error) {
		list, err = s.client.LeasesService().List(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	var ids []string
	for _, l := range list {
		if !strings.HasPrefix(l.ID, pullLease) {
			ids = append(ids, l.ID)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// Record keeps data as a labelled blob of containerd's content store for as
// long as the lease lives.
func (s *Store) Record(ctx context.Context, lease string, labels map[string]string, data []byte) error {
	ref := "dev.liquidmetal.flintlockd/microvm/" + strings.TrimPrefix(lease, "flintlock/")
	blob := ocispec.Descriptor{MediaType: "application/json", Digest: digest.FromBytes(data), Size: int64(len(data))}
	err := s.answering(ctx, func(ctx context.Context) error {
		return content.WriteBlob(leases.WithLease(ctx, lease), s.client.ContentStore(), ref, strings.NewReader(string(data)), blob, content.WithLabels(labels))
	})
	if err != nil {
		return fmt.Errorf("record %s: %w", lease, err)
	}
	return nil
}

// Recorded reads the blobs that Record wrote with all of these labels, each
// with its own labels.
func (s *Store) Recorded(ctx context.Context, labels map[string]string, visit func(labels map[string]string, data []byte) error) error {
	var filter []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		filter = append(filter, fmt.Sprintf("labels.%q==%q", k, labels[k]))
	}
	cs := s.client.ContentStore()
	err := cs.Walk(ctx, func(i content.Info) error {
		data, err := content.ReadBlob(ctx, cs, ocispec.Descriptor{Digest: i.Digest, Size: i.Size})
		if err != nil {
			return err
		}
		return visit(i.Labels, data)
	}, strings.Join(filter, ","))
	if err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	return nil
}

// Facts are what containerd holds in the store's namespace.
type Facts struct {
	Socket       string
	Version      string
	Namespace    string
	Snapshotter  string // of volumes
	Images       []string
	Leases       []string
	Snapshots    int // of all snapshotters
	Content      int
	ContentBytes int64
}

// Facts asks containerd what it holds.
func (s *Store) Facts(ctx context.Context) (Facts, error) {
	f := Facts{Socket: s.c.Socket, Namespace: s.c.Namespace, Snapshotter: blockfile}
	v, err := s.client.Version(ctx)
	if err != nil {
		return Facts{}, fmt.Errorf("ask containerd: %w", err)
	}
	f.Version = v.Version
	images, err := s.client.ImageService().List(ctx)
	if err != nil {
		return Facts{}, fmt.Errorf("list images: %w", err)
	}
	for _, i := range images {
		f.Images = append(f.Images, i.Name)
	}
	slices.Sort(f.Images)
	if f.Leases, err = s.Leases(ctx); err != nil {
		return Facts{}, err
	}
	add := func(i content.Info) error { f.Content++; f.ContentBytes += i.Size; return nil }
	for _, snapshotter := range []string{blockfile, native} {
		n, bad := s.countSnapshots(ctx, snapshotter)
		f.Snapshots, err = f.Snapshots+n, errors.Join(err, bad)
	}
	err = errors.Join(err, s.client.ContentStore().Walk(ctx, add))
	if err != nil {
		return Facts{}, fmt.Errorf("list snapshots and content: %w", err)
	}
	return f, nil
}

// countSnapshots counts those of a snapshotter, none of one that this containerd
// lacks: flintlock's has no blockfile.
func (s *Store) countSnapshots(ctx context.Context, snapshotter string) (n int, err error) {
	err = s.client.SnapshotService(snapshotter).Walk(ctx, func(context.Context, snapshots.Info) error { n++; return nil })
	if errdefs.IsInvalidArgument(err) {
		return 0, nil
	}
	return n, err
}
