package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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

// replace writes a file in one step; sync puts its content on disk first.
func replace(path string, data []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
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
