package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/run"
)

// Remove ends all that runs in the lab's machines and takes away what Ensure and
// Start made, also if they were killed half-way. It finds what there is by names
// and pins. The machines' files in Dir stay.
func (l *Lab) Remove(ctx context.Context) error {
	if err := l.stopSupervisor(ctx); err != nil {
		return err
	}
	if err := l.endProcesses(ctx); err != nil {
		return err
	}
	pins, err := os.ReadDir(filepath.Join(l.RunDir, "ns"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var problems []error
	for _, pin := range pins {
		problems = append(problems, link.UnpinNamespace(l.pin(pin.Name())))
	}
	problems = append(problems, link.Remove(l.Device()), nat.Remove(l.Device()), nat.RemovePassage(l.Device()), l.restoreForwarding())
	for mounted(l.RunDir) {
		if err := unix.Unmount(l.RunDir, unix.MNT_DETACH); err != nil {
			problems = append(problems, fmt.Errorf("unmount %s: %w", l.RunDir, err))
			break
		}
	}
	problems = append(problems, os.RemoveAll(l.RunDir))
	// Shared by all labs of this machine: gone with the last.
	os.Remove(filepath.Dir(l.RunDir))
	return errors.Join(problems...)
}

// endProcesses ends every process in the lab's network namespaces: roles,
// hypervisors, shells. All are asked first; those that don't go in time are killed.
func (l *Lab) endProcesses(ctx context.Context) error {
	inside, err := l.processes()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	done := make(chan error, len(inside))
	for _, p := range inside {
		go func() {
			defer p.Close()
			done <- p.Stop(ctx)
		}()
	}
	var problems []error
	for range inside {
		problems = append(problems, <-done)
	}
	return errors.Join(problems...)
}

// processes finds the roles, also those that are only about to enter their
// machine, and all processes in the lab's network namespaces.
func (l *Lab) processes() ([]*run.Process, error) {
	var found []*run.Process
	seen := map[int]bool{os.Getpid(): true}
	roles, _ := filepath.Glob(filepath.Join(l.RunDir, "roles", "*.json"))
	for _, path := range roles {
		r, err := readRole(path)
		if err != nil {
			continue
		}
		if p, err := run.FindProcess(r.PID, r.Start); err == nil {
			found = append(found, p)
			seen[r.PID] = true
		}
	}
	ours := map[uint64]bool{}
	pins, _ := os.ReadDir(filepath.Join(l.RunDir, "ns"))
	for _, pin := range pins {
		if ns, err := link.OpenNamespace(l.pin(pin.Name())); err == nil {
			if inode, err := ns.Inode(); err == nil {
				ours[inode] = true
			}
			ns.Close()
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || seen[pid] {
			continue
		}
		var s unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &s) != nil || !ours[s.Ino] {
			continue
		}
		if p, err := run.FindProcess(pid, 0); err == nil {
			found = append(found, p)
		}
	}
	return found, nil
}
