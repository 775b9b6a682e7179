package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/flintlock"
	"ingot/internal/vm"
)

// record is what must survive: what was asked for. It is the truth about a
// microVM; what is lies beside it and may be lost.
type record struct {
	Format   int     `json:"format"`
	Spec     vm.Spec `json:"spec"`
	User     int     `json:"user"`
	Stopped  bool    `json:"stopped,omitempty"` // it should not run
	Again    bool    `json:"again,omitempty"`   // but once it does not, it should
	Paused   bool    `json:"paused,omitempty"`  // its CPUs should stand still
	Deleting bool    `json:"deleting,omitempty"`
	// Key is what whoever asked for it calls the request, and Asked the digest of the
	// spec that was asked for: asked for again, it is not made again.
	Key   string `json:"key,omitempty"`
	Asked string `json:"asked,omitempty"`
	// DeletedAt is when that was asked for.
	DeletedAt time.Time `json:"deleted_at,omitzero"`
	// StopBy is when the guest's time to shut down is over, also for the daemon
	// that comes after the one that was told.
	StopBy time.Time `json:"stop_by,omitzero"`
	// Patience is what that was of time: a clock that was set back must not make it more.
	Patience time.Duration `json:"patience,omitzero"`
	// StartedAt is when it was last said that it should run again: an end before
	// that is of an earlier life, and decides nothing.
	StartedAt time.Time `json:"started_at,omitzero"`
	// Flintlock is what flintlock has made for it; nil: it is not flintlock's.
	Flintlock *flintlock.Things `json:"flintlock,omitempty"`

	Dir string `json:"-"`
}

// stop says that the microVM should not run, or should. One that is being deleted
// is past that.
func (r *record) stop(stop bool) error {
	if r.Deleting {
		return fmt.Errorf("microvm %s is being deleted: %w", r.Spec.UID, errdefs.ErrFailedPrecondition)
	}
	if r.Stopped && !stop {
		r.StartedAt = time.Now()
	}
	r.Stopped, r.Again, r.Paused, r.StopBy, r.Patience = stop, false, false, time.Time{}, 0
	return nil
}

// again says that the microVM should run, if it should still be restarted.
func (r *record) again() error {
	if !r.Stopped || !r.Again {
		return nil
	}
	return r.stop(false)
}

const (
	recordFormat = 1
	recordName   = "vm.json"
	statusName   = "status.json"
)

// Broken is a record that can't be read. Its microVM is left alone.
type Broken struct {
	Path string
	Err  error
}

// readRecords reads what is in the state directory.
func readRecords(root string) (good []record, broken []Broken, err error) {
	paths, err := filepath.Glob(filepath.Join(root, "*", "*", "*", recordName))
	if err != nil {
		return nil, nil, err
	}
	for _, path := range paths {
		r, err := readRecord(root, path)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			broken = append(broken, Broken{path, err})
		default:
			good = append(good, r)
		}
	}
	return good, broken, nil
}

// readRecord reads a record that is in its place.
func readRecord(root, path string) (record, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return record{}, err
	}
	r, err := decodeRecord(root, b)
	if err == nil && r.Dir != filepath.Dir(path) {
		err = fmt.Errorf("it is the record of %s", r.Dir)
	}
	return r, err
}

// decodeRecord reads a record, and finds its place.
func decodeRecord(root string, b []byte) (record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("format %d is not known to this version", r.Format)
	}
	if err := validPlace(r.Spec); err != nil {
		return r, err
	}
	r.Dir = place(root, r.Spec)
	return r, nil
}

// validPlace returns the mistakes in what a place is made of. A record may be older
// than some other rule, and its microVM is kept all the same.
func validPlace(s vm.Spec) error {
	if s.UID == "" {
		return &vm.FieldError{Field: "uid", Problem: "is required"}
	}
	var mistakes []error
	if all, ok := s.Validate().(interface{ Unwrap() []error }); ok {
		for _, err := range all.Unwrap() {
			var m *vm.FieldError
			if errors.As(err, &m) && (m.Field == "uid" || m.Field == "id" || m.Field == "namespace") {
				mistakes = append(mistakes, err)
			}
		}
	}
	return errors.Join(mistakes...)
}

func place(root string, s vm.Spec) string { return filepath.Join(root, s.Namespace, s.Name, s.UID) }

// save puts a record on disk in place of an older one.
func (r record) save() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	err = replace(filepath.Join(r.Dir, recordName), b, true)
	if errors.Is(err, os.ErrNotExist) {
		return r.create() // somebody has removed it all
	}
	if err != nil {
		return err
	}
	return syncFile(r.Dir)
}

// create puts a new record on disk: the file, its name, and the names of the
// directories above that were made for it.
func (r record) create() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	for {
		err := r.write(b)
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		// The last microVM of the same name or namespace went, and took the
		// directory above with it: once more.
	}
}

func (r record) write(b []byte) error {
	made, err := makeDirs(r.Dir)
	if err != nil {
		return err
	}
	path := filepath.Join(r.Dir, recordName)
	ordered, err := ordered(r.Dir)
	if err != nil {
		return err
	}
	if ordered {
		// Nobody was told of it yet, so it may have its name before it is on disk;
		// then one sync is for all (docs/decisions/007-one-sync.md).
		return errors.Join(replace(path, b, false), syncFile(path))
	}
	if err := replace(path, b, true); err != nil {
		return err
	}
	for _, dir := range append(made, r.Dir) {
		if err := syncFile(dir); err != nil {
			return err
		}
	}
	return nil
}

// lay puts a new record in its place, which is not on disk then.
func (r record) lay(b []byte) error {
	for {
		_, err := makeDirs(r.Dir)
		if err == nil {
			err = replace(filepath.Join(r.Dir, recordName), b, false)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
}

// ordered says whether a file system brings metadata to disk in the order of the
// changes, so that a sync of a file that was just renamed does so for its name and
// for the directories above, too.
func ordered(dir string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return false, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	switch s.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}

// makeDirs makes a directory and returns those above it that got a new name.
func makeDirs(dir string) (parents []string, err error) {
	if _, err := os.Stat(dir); err == nil {
		return nil, nil
	}
	parent := filepath.Dir(dir)
	if parents, err = makeDirs(parent); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	return append(parents, parent), nil
}

// remove takes a microVM's directory away, its record last: what a killed daemon
// leaves of it is found by the record, or is empty.
func (r record) remove() error {
	files, err := os.ReadDir(r.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, f := range files {
		if f.Name() == recordName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(r.Dir, f.Name())); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(r.Dir); err != nil {
		return err
	}
	removeEmpty(filepath.Dir(r.Dir))
	return nil
}

// removeEmpty removes the directory of a name, and of its namespace, if it is empty.
func removeEmpty(name string) {
	if err := os.Remove(name); err == nil || errors.Is(err, os.ErrNotExist) {
		os.Remove(filepath.Dir(name))
	}
}

// sweepFiles removes what a daemon that was killed in the middle of writing has
// left: files that were to replace others, and empty directories. So is an empty
// record: a power failure left it of a create that nobody was told of.
func sweepFiles(root string) error {
	_, err := sweepDir(root, 3)
	return err
}

// sweepDir sweeps a directory that is so many above the microVMs' own, and says how
// much is left in it.
func sweepDir(dir string, above int) (left int, err error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	left = len(files)
	problems := []error{err}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		gone := above == 0 && (strings.HasPrefix(f.Name(), tornPrefix) || f.Name() == recordName && empty(f))
		if above > 0 && f.IsDir() {
			below, err := sweepDir(path, above-1)
			problems = append(problems, err)
			gone = below == 0 && err == nil
		}
		if !gone {
			continue
		}
		err := os.Remove(path)
		problems = append(problems, err)
		if err == nil {
			left--
		}
	}
	return left, errors.Join(problems...)
}

func empty(f os.DirEntry) bool {
	info, err := f.Info()
	return err == nil && info.Mode().IsRegular() && info.Size() == 0
}

// tornPrefix begins the names of files that are being written.
const tornPrefix = ".new-"

// replace writes a file in one step; sync puts its content on disk first.
func replace(path string, data []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), tornPrefix+"*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// syncFile puts a file or a directory on disk.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// scarce says of an error that the machine has no more of something, if that is so.
func scarce(err error) error {
	for _, e := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
		}
	}
	return err
}

// saveDelay is how long a status that could not be written down waits.
const saveDelay = 5 * time.Second

// save writes the status down: for people, and for the next daemon, which can do
// without it.
func (v *instance) save() {
	v.mu.Lock()
	status, dirty := v.status, v.dirty
	v.dirty = false
	v.mu.Unlock()
	if !dirty {
		return
	}
	b, err := json.MarshalIndent(status, "", "  ")
	if err == nil {
		err = replace(filepath.Join(v.dir, statusName), b, false)
	}
	if err == nil {
		v.saveAt = time.Time{}
		return
	}
	if v.saveAt.IsZero() { // said once
		v.log.Warn("write status", "err", err)
	}
	v.saveAt = time.Now().Add(saveDelay)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dirty = true
}

// readStatus reads what was, as far as it is still there.
func readStatus(dir string) vm.Status {
	var s vm.Status
	b, err := os.ReadFile(filepath.Join(dir, statusName))
	if err != nil || json.Unmarshal(b, &s) != nil {
		return vm.Status{Phase: vm.Pending, Version: 1}
	}
	return s
}

// atMost is a time that is not further away than that.
func atMost(t time.Time, away time.Duration) time.Time {
	if t.IsZero() {
		return t
	}
	return earlier(t, time.Now().Add(away))
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
