package flintlock

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Began says whether flintlock has started a hypervisor in dir, running or not.
func Began(dir string) bool {
	for _, name := range []string{Firecracker, CloudHypervisor} {
		if (&Driver{name: name}).began(dir) {
			return true
		}
	}
	return false
}

// Directories are those below root, of NAMESPACE/NAME/UID, that flintlock has
// started a hypervisor in.
func Directories(root string) ([]string, error) {
	var dirs []string
	for _, name := range []string{Firecracker, CloudHypervisor} {
		paths, err := filepath.Glob(filepath.Join(root, "*", "*", "*", name+".pid"))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			if dir := filepath.Dir(path); !slices.Contains(dirs, dir) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs, nil
}

// Complete adds the devices that Firecracker was given and that the record does not
// name: flintlock writes them down last, and may have been killed before.
func (t *Things) Complete(dir string) {
	text, err := os.ReadFile(filepath.Join(dir, Firecracker+".cfg"))
	if err != nil {
		return
	}
	var c struct {
		Interfaces []struct {
			ID     string `json:"iface_id"`
			Device string `json:"host_dev_name"`
		} `json:"network-interfaces"`
	}
	if json.Unmarshal(text, &c) != nil {
		return
	}
	for _, n := range c.Interfaces {
		if t.Devices[n.ID] == "" && deviceRule.MatchString(n.Device) {
			t.Devices[n.ID] = n.Device
		}
	}
}

// Clear ends and removes what flintlock has made for a microVM whose hypervisor is
// gone, beside what the host knows of: virtiofsd, and the sockets that are elsewhere.
func (t Things) Clear(dir string) error {
	return errors.Join(endVirtiofsd(dir), removeSockets(t.Sockets))
}

// endVirtiofsd ends the program that has served a directory to the guest, and that
// ends with its guest unless that never came.
func endVirtiofsd(dir string) error {
	pid, err := readPID(filepath.Join(dir, "virtiofs.pid"))
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	uid := filepath.Base(dir)
	p, err := hold(pid, func(words []string) bool {
		return slices.ContainsFunc(words, func(word string) bool {
			socket, ok := strings.CutPrefix(word, "--socket-path=")
			return ok && filepath.Base(filepath.Dir(socket)) == uid
		})
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	_, _, err = p.Wait()
	return err
}

// removeSockets removes a directory that has nothing but sockets in it.
func removeSockets(dir string) error {
	if dir == "" {
		return nil
	}
	files, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	problems := []error{err}
	for _, f := range files {
		if f.Type() == os.ModeSocket {
			problems = append(problems, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
	if err := os.Remove(dir); !errors.Is(err, unix.ENOTEMPTY) { // somebody else has files there
		problems = append(problems, err)
	}
	return errors.Join(problems...)
}
