package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/image/claim"
	"ingot/internal/pool"
	"ingot/internal/vm"
)

// blockfile is a snapshotter: a snapshot is a file with an ext4 in it, and a
// snapshot's child begins as a reflink of it. containerd's own of that name
// copies and syncs inside a database of its own: five syncs a snapshot. This
// one has no database. What a snapshot is stands in an extended attribute of
// its file, and only Commit syncs.
//
// After a power failure an active snapshot may therefore be missing that
// containerd's database has. Then nobody ever synced anything in it, because
// that would have brought the file to disk too (pool.Clone), and a fresh clone
// is a state that its user could have found anyway: claims make it again.
type blockfile struct {
	dir     string
	scratch string

	mu      sync.Mutex // guards what follows; never held over a clone
	entries map[string]*entry
	next    int
	claimed map[string]bool // made in a transaction that is not committed yet
	// undecided are those of them that the transaction under way has made.
	undecided []string

	// alive tells whether containerd's database has this snapshot. It is set
	// before the first request is served.
	alive func(key string) bool
}

type entry struct {
	snapshots.Info
	file string // the name in dir
	data string // the name of the file with the blocks: a view has none of its own
	busy bool   // being made
}

const (
	attribute = "user.ingot.snapshot"
	scratch   = "scratch.ext4"
)

func openBlockfile(ctx context.Context, root string, size vm.MiB) (*blockfile, error) {
	b := &blockfile{
		dir:     filepath.Join(root, "snapshots"),
		scratch: filepath.Join(root, scratch),
		entries: map[string]*entry{},
		claimed: map[string]bool{},
		alive:   func(string) bool { return true },
	}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	if err := ensureScratch(ctx, b.scratch, size); err != nil {
		return nil, err
	}
	return b, b.load()
}

// load reads what snapshots there are. A file without the attribute was being
// made when the machine stopped.
func (b *blockfile) load() error {
	files, err := os.ReadDir(b.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(b.dir, f.Name())
		n, err := strconv.Atoi(f.Name())
		if err != nil {
			continue
		}
		e := &entry{file: f.Name()}
		e.Info, e.data, err = readAttribute(path)
		if errors.Is(err, unix.ENODATA) {
			if err := os.Remove(path); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("read snapshot %s: %w", path, err)
		}
		b.next = max(b.next, n)
		b.entries[e.Name] = e
	}
	return nil
}

// record is the attribute's content.
type record struct {
	Info snapshots.Info `json:"info"`
	Data string         `json:"data"`
}

func readAttribute(path string) (snapshots.Info, string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, attribute, buf)
	if err != nil {
		return snapshots.Info{}, "", err
	}
	var r record
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return snapshots.Info{}, "", err
	}
	return r.Info, r.Data, nil
}

func writeAttribute(f *os.File, e entry) error {
	value, err := json.Marshal(record{Info: e.Info, Data: e.data})
	if err != nil {
		return err
	}
	if err := unix.Fsetxattr(int(f.Fd()), attribute, value, 0); err != nil {
		return fmt.Errorf("record snapshot %s: %w", e.Name, err)
	}
	return nil
}

// find returns a finished snapshot, by value: callers change the labels that
// they get.
func (b *blockfile) find(key string) (entry, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.entries[key]
	if !ok || e.busy {
		return entry{}, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	found := *e
	found.Labels = maps.Clone(e.Labels)
	return found, nil
}

func (b *blockfile) path(name string) string { return filepath.Join(b.dir, name) }

func (b *blockfile) Stat(_ context.Context, key string) (snapshots.Info, error) {
	e, err := b.find(key)
	return e.Info, err
}

func (b *blockfile) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	e, err := b.find(key)
	if err != nil {
		return nil, err
	}
	return b.mounts(e), nil
}

func (b *blockfile) mounts(e entry) []mount.Mount {
	mode := "rw"
	if e.Kind == snapshots.KindView {
		mode = "ro"
	}
	// No discard: a base image's free blocks are shared anyway.
	return []mount.Mount{{Type: "ext4", Source: b.path(e.data), Options: []string{"loop", mode}}}
}

func (b *blockfile) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return b.create(ctx, snapshots.KindActive, key, parent, opts)
}

func (b *blockfile) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return b.create(ctx, snapshots.KindView, key, parent, opts)
}

func (b *blockfile) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	now := time.Now().UTC()
	e := entry{Info: snapshots.Info{Kind: kind, Name: key, Parent: parent, Created: now, Updated: now}, busy: true}
	for _, opt := range opts {
		if err := opt(&e.Info); err != nil {
			return nil, err
		}
	}
	source, err := b.reserve(&e)
	if err != nil {
		return nil, err
	}
	if err := b.make(e, source); err != nil {
		b.forget(key)
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := b.makeRoom(ctx, e); err != nil {
		b.forget(key)
		return nil, errors.Join(fmt.Errorf("make snapshot %s: %w", key, err), os.Remove(b.path(e.file)))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.entries[key].busy = false
	return b.mounts(e), nil
}

// reserve takes the key and a file name, and says which file to clone.
func (b *blockfile) reserve(e *entry) (source string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.entries[e.Name]; ok {
		return "", fmt.Errorf("snapshot %s: %w", e.Name, errdefs.ErrAlreadyExists)
	}
	source = b.scratch
	b.next++
	e.file = strconv.Itoa(b.next)
	e.data = e.file
	if e.Parent != "" {
		p, ok := b.entries[e.Parent]
		if !ok || p.busy {
			return "", fmt.Errorf("parent snapshot %s: %w", e.Parent, errdefs.ErrNotFound)
		}
		if p.Kind != snapshots.KindCommitted {
			return "", fmt.Errorf("parent snapshot %s is not committed: %w", e.Parent, errdefs.ErrInvalidArgument)
		}
		source = b.path(p.data)
		if e.Kind == snapshots.KindView {
			e.data = p.data
		}
	}
	copied := *e
	b.entries[e.Name] = &copied
	return source, nil
}

func (b *blockfile) forget(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, key)
}

// make makes the snapshot's file. There is no sync, see blockfile.
func (b *blockfile) make(e entry, source string) error {
	path := b.path(e.file)
	var f *os.File
	var err error
	if e.data == e.file {
		f, err = pool.Clone(path, source)
	} else {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err != nil {
		return err
	}
	if err := errors.Join(writeAttribute(f, e), f.Close()); err != nil {
		os.Remove(path)
		return err
	}
	return nil
}

// makeRoom grows a snapshot that is to take more than a usual volume's.
func (b *blockfile) makeRoom(ctx context.Context, e entry) error {
	label := e.Labels[claim.RoomLabel]
	if label == "" || e.Kind != snapshots.KindActive {
		return nil
	}
	times, err := strconv.ParseInt(label, 10, 32)
	if err != nil || times < 1 || times > claim.MostRoom {
		return fmt.Errorf("label %s: %q is not a number up to %d: %w", claim.RoomLabel, label, claim.MostRoom, errdefs.ErrInvalidArgument)
	}
	scratch, err := os.Stat(b.scratch)
	if err != nil {
		return err
	}
	return pool.Grow(ctx, b.path(e.file), vm.MiB(times*scratch.Size()>>20))
}

// Commit makes a snapshot a parent of others. Its blocks and its name are on
// disk before containerd's database says so.
func (b *blockfile) Commit(_ context.Context, name, key string, opts ...snapshots.Opt) error {
	e, err := b.find(key)
	if err != nil {
		return err
	}
	if e.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %s is not active: %w", key, errdefs.ErrFailedPrecondition)
	}
	if _, err := b.find(name); err == nil {
		return fmt.Errorf("snapshot %s: %w", name, errdefs.ErrAlreadyExists)
	}
	now := time.Now().UTC()
	// As in containerd's own: a committed snapshot begins anew, labels are not inherited.
	e.Info = snapshots.Info{Kind: snapshots.KindCommitted, Name: name, Parent: e.Parent, Created: now, Updated: now}
	for _, opt := range opts {
		if err := opt(&e.Info); err != nil {
			return err
		}
	}
	if err := b.update(e, true); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, key)
	b.entries[name] = &e
	return nil
}

// update writes an entry's attribute again.
func (b *blockfile) update(e entry, sync bool) error {
	f, err := os.OpenFile(b.path(e.file), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := writeAttribute(f, e); err != nil || !sync {
		return err
	}
	return f.Sync()
}

func (b *blockfile) Update(_ context.Context, info snapshots.Info, fields ...string) (snapshots.Info, error) {
	e, err := b.find(info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	labels := e.Labels
	if len(fields) == 0 || slices.Contains(fields, "labels") {
		labels = maps.Clone(info.Labels)
		fields = slices.DeleteFunc(slices.Clone(fields), func(f string) bool { return f == "labels" })
	}
	for _, f := range fields {
		name, ok := trimLabel(f)
		if !ok {
			return snapshots.Info{}, fmt.Errorf("update snapshot %s: field %s cannot be changed: %w", info.Name, f, errdefs.ErrInvalidArgument)
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[name] = info.Labels[name]
	}
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	e.Labels, e.Updated = labels, time.Now().UTC()
	if err := b.update(e, false); err != nil {
		return snapshots.Info{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	kept := e
	kept.Labels = maps.Clone(e.Labels)
	b.entries[e.Name] = &kept
	return e.Info, nil
}

// Remove removes a snapshot that containerd's database no longer has. The
// garbage collector looks into the database first and into this snapshotter
// after, and a claim may commit in between: it must not lose its volume.
func (b *blockfile) Remove(_ context.Context, key string) error {
	e, err := b.find(key)
	if err != nil {
		return err
	}
	if b.isClaimed(key) || b.alive(key) {
		return fmt.Errorf("remove snapshot %s: it is in use: %w", key, errdefs.ErrFailedPrecondition)
	}
	return b.remove(e)
}

func (b *blockfile) remove(e entry) error {
	if err := b.dropUnlessParent(e); err != nil {
		return err
	}
	if err := os.Remove(b.path(e.file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove snapshot %s: %w", e.Name, err)
	}
	return nil
}

func (b *blockfile) dropUnlessParent(e entry) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, other := range b.entries {
		if other.Parent == e.Name {
			return fmt.Errorf("remove snapshot %s: %s is made from it: %w", e.Name, other.Name, errdefs.ErrFailedPrecondition)
		}
	}
	delete(b.entries, e.Name)
	return nil
}

func (b *blockfile) isClaimed(key string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.claimed[key]
}

func (b *blockfile) Usage(_ context.Context, key string) (snapshots.Usage, error) {
	e, err := b.find(key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	size, err := ownBytes(b.path(e.file))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("measure snapshot %s: %w", key, err)
	}
	return snapshots.Usage{Inodes: 1, Size: size}, nil
}

func (b *blockfile) Walk(ctx context.Context, visit snapshots.WalkFunc, texts ...string) error {
	filter, err := filters.ParseAll(texts...)
	if err != nil {
		return fmt.Errorf("walk snapshots: %w", err)
	}
	for _, info := range b.all() {
		if !filter.Match(fieldsOf(info)) {
			continue
		}
		if err := visit(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// all lists the finished snapshots, oldest first.
func (b *blockfile) all() []snapshots.Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []snapshots.Info
	for _, e := range b.entries {
		if !e.busy {
			info := e.Info
			info.Labels = maps.Clone(e.Labels)
			list = append(list, info)
		}
	}
	slices.SortFunc(list, func(x, y snapshots.Info) int { return x.Created.Compare(y.Created) })
	return list
}

func (b *blockfile) Close() error { return nil }
