// Package pool says where volumes live: a directory whose file system can share
// blocks between files (FICLONE). Where the directory given cannot, the package
// makes a sparse XFS image in it and mounts that. It owns the image, its loop
// device and the mount point; it does not know what is stored inside, and never
// unmounts, because the volumes of running microVMs are open there.
package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vm"
)

const (
	// DefaultSize is an image's size where the file system beneath has the room.
	DefaultSize = vm.MiB(40 << 10)
	// DefaultReserve is what an image leaves free beneath.
	DefaultReserve = vm.MiB(2 << 10)
	// MinSize is the smallest image worth making; mkfs.xfs refuses less than 300 MB.
	MinSize = vm.MiB(400)
)

// Options say how an image is made. They do not matter where the directory
// itself can share blocks, or where an image is there already.
type Options struct {
	Size    vm.MiB // 0: DefaultSize, or less where that does not fit
	Reserve vm.MiB // 0: DefaultReserve
}

// Pool is a directory that can share blocks between files.
type Pool struct {
	dir   string // what Open was given; the image's file system
	path  string
	image string // the image's path, empty where dir itself can share blocks
}

// Facts are a pool's state. Available is what can really still be written: an
// image is sparse, so the file system beneath it can be full first.
type Facts struct {
	Path      string
	Image     string // empty: no image, the directory itself
	Type      string // xfs, btrfs, …
	Size      int64
	Used      int64
	Backing   int64 // free bytes of the file system beneath
	Available int64
	Inodes    int64 // how many files can still be made, in the pool or beneath
}

// Open makes sure that dir/pool is a directory that can share blocks, and
// returns it. It may be repeated, also after a crash at any point.
func Open(ctx context.Context, dir string, o Options) (*Pool, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	p := &Pool{dir: dir, path: filepath.Join(dir, "pool")}
	if err := os.MkdirAll(p.path, 0o700); err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	image := filepath.Join(dir, "pool.xfs")
	_, err = os.Stat(image)
	if errors.Is(err, os.ErrNotExist) {
		if canClone(p.path) == nil {
			return p, nil
		}
		err = makeImage(ctx, image, o)
	}
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	p.image = image
	if err := ensureMounted(image, p.path); err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	if err := canClone(p.path); err != nil {
		return nil, fmt.Errorf("open pool: %s is mounted but cannot share blocks: %w", p.path, err)
	}
	return p, nil
}

// Path is the directory to put volumes in.
func (p *Pool) Path() string { return p.path }

// Facts reads the pool's state.
func (p *Pool) Facts() (Facts, error) { return ReadFacts(p.dir) }

// ReadFacts reads the state of the pool that Open made in dir, for a process
// that did not open it.
func ReadFacts(dir string) (Facts, error) {
	f := Facts{Path: filepath.Join(dir, "pool")}
	var in, beneath unix.Statfs_t
	err := unix.Statfs(f.Path, &in)
	if errors.Is(err, fs.ErrNotExist) {
		return Facts{}, fmt.Errorf("read pool: %s is not there: `ingot containerd` makes it: %w", f.Path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return Facts{}, fmt.Errorf("read pool %s: %w", f.Path, err)
	}
	if err := unix.Statfs(dir, &beneath); err != nil {
		return Facts{}, fmt.Errorf("read pool %s: %w", dir, err)
	}
	f.Type = typeName(in.Type)
	f.Size = int64(in.Blocks) * in.Bsize
	f.Used = int64(in.Blocks-in.Bfree) * in.Bsize
	f.Backing = int64(beneath.Bavail) * beneath.Bsize
	f.Available = min(int64(in.Bavail)*in.Bsize, f.Backing)
	f.Inodes = math.MaxInt64
	for _, s := range []unix.Statfs_t{in, beneath} {
		if s.Files != 0 { // btrfs has no such number
			f.Inodes = min(f.Inodes, int64(s.Ffree))
		}
	}
	image := filepath.Join(dir, "pool.xfs")
	if _, err := os.Stat(image); err == nil {
		f.Image = image
		if in.Fsid == beneath.Fsid {
			return Facts{}, fmt.Errorf("read pool: %s is not mounted on %s: %w", image, f.Path, errdefs.ErrFailedPrecondition)
		}
	}
	return f, nil
}

// What is kept for the microVMs that are there when no more are let in: their
// volumes share blocks that they will come to write.
const (
	keepPart   = 20      // of the pool's size
	keepMost   = 1 << 30 // bytes
	keepInodes = 1000
)

func (f Facts) kept() int64 { return min(f.Size/keepPart, keepMost) }

// Full says why no volume should be made any more; nil if there is room. It is an
// errdefs.ErrResourceExhausted.
func (f Facts) Full() error {
	switch {
	case f.Available < f.kept():
		return fmt.Errorf("the pool at %s has %d MiB left of %d, and the file system beneath %d: %d MiB are kept for the microVMs that are there; remove some, or images (`ingot image prune`): %w",
			f.Path, f.Available>>20, f.Size>>20, f.Backing>>20, f.kept()>>20, errdefs.ErrResourceExhausted)
	case f.Inodes < keepInodes:
		return fmt.Errorf("the file system of %s has room for %d files only: %w", f.Path, f.Inodes, errdefs.ErrResourceExhausted)
	}
	return nil
}

// Low says what will soon be full; empty if there is room.
func (f Facts) Low() string {
	switch {
	case f.Available < 3*f.kept():
		return fmt.Sprintf("%d MiB are left, and no microVM is let in below %d", f.Available>>20, f.kept()>>20)
	case f.Inodes < 10*keepInodes:
		return fmt.Sprintf("there is room for %d files only", f.Inodes)
	}
	return ""
}

func typeName(magic int64) string {
	switch magic {
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	}
	return fmt.Sprintf("0x%x", magic)
}
