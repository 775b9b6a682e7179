package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// record is what must survive: what was asked for. It is the truth about a
// microVM; what is lies beside it and may be lost.
type record struct {
	Format   int     `json:"format"`
	Spec     vm.Spec `json:"spec"`
	User     int     `json:"user"`
	Stopped  bool    `json:"stopped,omitempty"` // it should not run
	Deleting bool    `json:"deleting,omitempty"`

	Dir string `json:"-"`
}

// stop says that the microVM should not run, or should. One that is being deleted
// is past that.
func (r *record) stop(stop bool) error {
	if r.Deleting {
		return fmt.Errorf("microvm %s is being deleted: %w", r.Spec.UID, errdefs.ErrFailedPrecondition)
	}
	r.Stopped = stop
	return nil
}

const (
	recordFormat = 1
	recordName   = "vm.json"
	statusName   = "status.json"
)

func readRecord(path string) (record, error) {
	var r record
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read %s: %w", path, err)
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("read %s: format %d is not known to this version", path, r.Format)
	}
	r.Dir = filepath.Dir(path)
	return r, nil
}

// save puts the record on disk: the file, its name, and the names of the
// directories above that were made for it.
func (r record) save() error {
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
	if err := replace(filepath.Join(r.Dir, recordName), b, true); err != nil {
		return err
	}
	for _, dir := range append(made, r.Dir) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
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
	if os.Remove(name) == nil {
		os.Remove(filepath.Dir(name))
	}
}

// sweepFiles removes what a daemon that was killed in the middle of writing has
// left: files that were to replace others, and empty directories.
func sweepFiles(root string) error {
	torn, err := filepath.Glob(filepath.Join(root, "*", "*", "*", tornPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range torn {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	for _, pattern := range []string{"*/*/*", "*/*", "*"} {
		dirs, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			os.Remove(dir) // unless there is something in it
		}
	}
	return nil
}

// tornPrefix begins the names of files that are being written.
const tornPrefix = ".new-"

// replace writes a file in one step; sync puts its content on disk first.
func replace(path string, data []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), tornPrefix+"*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil && sync {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
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
