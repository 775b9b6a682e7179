// Package lab makes one machine look like several: each machine of a lab is a
// network, a mount and a UTS namespace, in which the same roles run as on metal,
// at the same paths, joined by one segment. It owns the namespaces, the wires
// between them, and the supervisor of the roles. It knows nothing of what the
// roles do, and needs neither systemd nor a container engine.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Config says what a lab is.
type Config struct {
	Name     string // of the environment
	Dir      string // what outlives a reboot: machines' files, logs
	RunDir   string // what does not: a tmpfs is mounted here
	Binary   string // the ingot binary
	Subnet   netip.Prefix
	Uplink   netip.Prefix // of the veth between this machine and the hub, a /30
	VPN      uint16       // UDP port of the hub that is this machine's too; zero: none
	Machines []Machine
}

// Machine is one machine of a lab.
type Machine struct {
	Name    string
	Address netip.Addr
	Hub     bool // the segment and the uplink begin here
	Host    bool // guests are joined here
	Roles   []Role
}

// Role is one long-lived process of the ingot binary.
type Role struct {
	Name string
	Args []string // ingot's arguments
	// Files of the machine that the role reads when it starts: if one changes, the
	// role is restarted.
	Files []string
}

// Segment is the name of the segment's interface on each machine; Uplink is the
// hub's interface to the world; Bridge is where a host's guests are joined.
const (
	Segment = "bond0.1000"
	Uplink  = "bond0"
	Bridge  = "ingot0"
	Port    = "seg0" // Segment's other end, on Bridge
)

// Lab is one lab. New only allocates; Ensure makes it so.
type Lab struct{ Config }

// New describes a lab.
func New(c Config) *Lab { return &Lab{Config: c} }

// Device is the name of this machine's end of the veth to the hub, and of the
// lab's nftables table: interface names end at 15 characters.
func (l *Lab) Device() string {
	name := "ingot-" + l.Name
	if len(name) > 15 {
		name = fmt.Sprintf("ingot-%x", []byte(link.MAC(l.Name)[1:5]))
	}
	return name
}

// HubEnd and RootEnd are the addresses of the veth between this machine and the hub.
func (l *Lab) HubEnd() netip.Addr { return l.RootEnd().Next() }

// RootEnd is this machine's own end.
func (l *Lab) RootEnd() netip.Addr { return l.Uplink.Masked().Addr().Next() }

// port is the name, on the hub, of a machine's wire to the segment.
func port(machine string) string {
	taken := []string{"all", "default", "lo", "segment", "hub0", "wire0", "vpn0", "tailscale0", Segment, Uplink, Bridge, Port}
	if len(machine) > 15 || slices.Contains(taken, machine) || strings.HasPrefix(machine, "fl") { // fltap…: guests'
		return fmt.Sprintf("m-%x", []byte(link.MAC(machine)[1:5]))
	}
	return machine
}

// pin is where a machine's namespaces are pinned.
func (l *Lab) pin(machine string) string { return filepath.Join(l.RunDir, "ns", machine) }

// files is where a machine's persistent files are.
func (l *Lab) files(machine string) string { return filepath.Join(l.Dir, "machines", machine) }

// LogPath is the file that a role logs to.
func (l *Lab) LogPath(machine, role string) string {
	return filepath.Join(l.Dir, "log", machine+"-"+role+".log")
}

// Command is a command that will run inside a machine.
func (l *Lab) Command(ctx context.Context, machine string, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, l.Binary, append([]string{"lab", "enter", l.pin(machine), "--"}, argv...)...)
}

// Enter replaces this process by argv, inside the namespaces pinned at pin.
func Enter(pin string, argv []string) error {
	ns, err := link.OpenNamespace(pin)
	if err != nil {
		return err
	}
	// The main goroutine's thread: the exec that follows keeps its namespaces.
	if err := lockAndEnter(ns); err != nil {
		return err
	}
	path := argv[0]
	if !strings.Contains(path, "/") {
		if path, err = exec.LookPath(path); err != nil {
			return fmt.Errorf("run %s: %w", argv[0], err)
		}
	}
	if err := unix.Exec(path, argv, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", path, err)
	}
	return nil
}

// WriteFile puts a file into a machine, if it is not there already as it should
// be. The path must be below one of the machine's own directories.
func (l *Lab) WriteFile(machine, path string, data []byte, mode os.FileMode) (changed bool, err error) {
	if !slices.ContainsFunc(directories, func(d string) bool { return strings.HasPrefix(path, d+"/") }) {
		return false, fmt.Errorf("write %s of %s: not one of a machine's own directories", path, machine)
	}
	full := filepath.Join(l.files(machine), path)
	if l.HasFile(machine, path, data) {
		return false, os.Chmod(full, mode)
	}
	return true, writeFile(full, data, mode)
}

// HasFile says whether a file of a machine is as it should be.
func (l *Lab) HasFile(machine, path string, data []byte) bool {
	have, err := os.ReadFile(filepath.Join(l.files(machine), path))
	return err == nil && string(have) == string(data)
}

// writeFile replaces a file in one step. What a writer that was killed has left
// is overwritten by the next one: no file has two writers at a time.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(path), ".new-"+filepath.Base(path)), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// State is a machine as it is.
type State struct {
	Machine
	Up    bool // its namespaces are there
	Roles []RoleState
}

// RoleState is a role as it is.
type RoleState struct {
	Name     string    `json:"name"`
	PID      int       `json:"pid"`
	Start    uint64    `json:"start"` // of the process, in clock ticks
	Running  bool      `json:"running"`
	Restarts int       `json:"restarts"`
	Since    time.Time `json:"since"`
	Print    string    `json:"fingerprint"`
	Stale    bool      `json:"-"` // it runs, and another binary, or with other arguments or files
	Log      string    `json:"log"`
}

// Up says whether any of the machines is there.
func (l *Lab) Up() bool {
	return slices.ContainsFunc(l.Machines, func(m Machine) bool {
		ns, err := link.OpenNamespace(l.pin(m.Name))
		if err == nil {
			ns.Close()
		}
		return err == nil
	})
}

// States says how the machines and their roles are.
func (l *Lab) States() []State {
	var states []State
	for _, m := range l.Machines {
		s := State{Machine: m}
		if ns, err := link.OpenNamespace(l.pin(m.Name)); err == nil {
			s.Up = true
			ns.Close()
		}
		for _, r := range m.Roles {
			role, _ := readRole(l.rolePath(m.Name, r.Name))
			role.Name, role.Log = r.Name, l.LogPath(m.Name, r.Name)
			role.Running = role.alive()
			print, err := l.fingerprint(m.Name, r)
			role.Stale = role.Running && err == nil && role.Print != print
			s.Roles = append(s.Roles, role)
		}
		states = append(states, s)
	}
	return states
}

func (l *Lab) rolePath(machine, role string) string {
	return filepath.Join(l.RunDir, "roles", machine+"."+role+".json")
}

func readRole(path string) (RoleState, error) {
	var s RoleState
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}
