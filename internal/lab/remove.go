package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/firewalld"
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
	machines, err := l.pinned()
	if err != nil {
		return err
	}
	if err := l.endProcesses(ctx, machines); err != nil {
		return err
	}
	var problems []error
	for _, m := range machines {
		problems = append(problems, link.UnpinNamespace(l.pin(m)))
	}
	problems = append(problems, link.Remove(l.Device()), nat.Remove(l.Device()), nat.RemovePassage(l.Device()),
		firewalld.Withdraw(ctx, l.firewalld()), l.restoreForwarding(ctx))
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

// Strays names the machines that are there and not in the configuration.
func (l *Lab) Strays() ([]string, error) {
	there, err := l.pinned()
	if err != nil {
		return nil, err
	}
	kept, err := names(filepath.Join(l.Dir, "machines"))
	if err != nil {
		return nil, err
	}
	there = append(there, kept...)
	slices.Sort(there)
	return slices.DeleteFunc(slices.Compact(there), func(name string) bool {
		return slices.ContainsFunc(l.Machines, func(m Machine) bool { return m.Name == name })
	}), nil
}

// prune removes machines that are no longer wanted, with their files.
func (l *Lab) prune(ctx context.Context) (changed bool, err error) {
	strays, err := l.Strays()
	if err != nil || len(strays) == 0 {
		return false, err
	}
	// It would start their roles again. Start brings it back.
	if err := l.stopSupervisor(ctx); err != nil {
		return false, err
	}
	if err := l.endProcesses(ctx, strays); err != nil {
		return false, err
	}
	for _, name := range strays {
		if err := l.removeMachine(name); err != nil {
			return true, fmt.Errorf("remove machine %s: %w", name, err)
		}
	}
	return true, nil
}

func (l *Lab) removeMachine(name string) error {
	if err := link.UnpinNamespace(l.pin(name)); err != nil {
		return err
	}
	if hub, err := link.OpenNamespace(l.pin(l.hub().Name)); err == nil {
		defer hub.Close()
		if err := hub.Do(func() error { return link.Remove(port(name)) }); err != nil {
			return err
		}
	}
	records, _ := filepath.Glob(filepath.Join(l.RunDir, "roles", name+".*.json"))
	for _, path := range append(records, l.madePath(name)) {
		if err := removeFile(path); err != nil {
			return err
		}
	}
	// Aside first: half of a machine's files must not become a machine's again.
	aside := name
	if !strings.HasPrefix(name, removed) {
		aside = removed + name
		if err := os.Rename(l.files(name), l.files(aside)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return errors.Join(os.RemoveAll(filepath.Join(l.scratch(), name)), os.RemoveAll(l.files(aside)))
}

// removed begins the name of a directory of files that are being removed. No
// machine is called so.
const removed = ".removed-"

// pinned names the machines whose namespaces are pinned, wanted or not.
func (l *Lab) pinned() ([]string, error) { return names(filepath.Join(l.RunDir, "ns")) }

// names lists a directory. One that is not there has none.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all, nil
}

// endProcesses ends every process in the network namespaces of machines: roles,
// hypervisors, shells. Roles go first: one that saw its hypervisors end would note
// it, or start them again. What is started meanwhile is found by the next look.
// All are asked first; those that don't go in time are killed.
func (l *Lab) endProcesses(ctx context.Context, machines []string) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		roles, others, err := l.processes(machines)
		if err != nil || len(roles)+len(others) == 0 {
			return err
		}
		if len(roles) > 0 {
			closeAll(others)
			others = roles
		}
		if err := stopAll(ctx, others); err != nil {
			return err
		}
	}
}

// stopAll stops processes side by side, and lets go of them.
func stopAll(ctx context.Context, all []*run.Process) error {
	defer closeAll(all)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	errs := make([]error, len(all))
	var stopping sync.WaitGroup
	for i, p := range all {
		stopping.Go(func() { errs[i] = p.Stop(ctx) })
	}
	stopping.Wait()
	return errors.Join(errs...)
}

func closeAll(all []*run.Process) {
	for _, p := range all {
		p.Close()
	}
}

// processes finds the roles of machines, also those that are only about to enter
// theirs, and all other processes in the machines' network namespaces.
func (l *Lab) processes(machines []string) (roles, others []*run.Process, err error) {
	seen := map[int]bool{os.Getpid(): true}
	records, _ := filepath.Glob(filepath.Join(l.RunDir, "roles", "*.json"))
	for _, path := range records {
		machine, _, _ := strings.Cut(filepath.Base(path), ".")
		r, err := readRole(path)
		if err != nil || !slices.Contains(machines, machine) {
			continue
		}
		if p, err := run.FindProcess(r.PID, r.Start); err == nil {
			roles = append(roles, p)
			seen[r.PID] = true
		}
	}
	ours := map[uint64]bool{}
	for _, machine := range machines {
		if ns, err := link.OpenNamespace(l.pin(machine)); err == nil {
			if inode, err := ns.Inode(); err == nil {
				ours[inode] = true
			}
			ns.Close()
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		closeAll(roles)
		return nil, nil, err
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
			others = append(others, p)
		}
	}
	return roles, others, nil
}
