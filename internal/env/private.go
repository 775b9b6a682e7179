package env

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"ingot/internal/inspect"
)

// checkFiles looks whether the files of all microVMs are there, and are nobody
// else's to read: consoles and metadata may have secrets.
func (e Env) checkFiles() inspect.Check {
	c := inspect.Check{Name: "files", Status: inspect.Pass}
	count := 0
	for _, m := range e.Hosts() {
		for _, path := range records(e.filesOf(m)) {
			count++
			if err := private(filepath.Dir(path)); err != nil {
				c.Status, c.Detail = inspect.Fail, fmt.Sprintf("on %s: %v", m.Name, err)
				return c
			}
		}
	}
	c.Detail = fmt.Sprintf("of %d microVMs, 0600 in 0700", count)
	return c
}

// private says what is wrong with a microVM's directory. What goes while it is
// looked at is no fault.
func private(dir string) error {
	var driver string // empty: it was never started
	there := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			return fmt.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
		there[entry.Name()] = true
		if name, ok := strings.CutSuffix(entry.Name(), ".pid"); ok {
			driver = name
		}
		return nil
	})
	if err == nil && driver != "" {
		for _, name := range []string{"vm.json", "metadata.json", driver + ".cfg", driver + ".log", driver + ".metrics", driver + ".stdout", driver + ".stderr"} {
			if !there[name] {
				err = fmt.Errorf("%s has no %s", dir, name)
			}
		}
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var record struct{ Deleting bool }
	b, gone := os.ReadFile(filepath.Join(dir, "vm.json"))
	if gone != nil || json.Unmarshal(b, &record) == nil && record.Deleting {
		return nil
	}
	return err
}
