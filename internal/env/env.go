// Package env brings an environment up and takes it down: one visible list of
// steps each. It owns the environment's directory, which holds its file, its
// certificates and its token, and knows how its services are reached.
package env

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"

	"ingot/internal/hub"
	"ingot/internal/lab"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// Root is where environments are kept, and RunRoot what a reboot may take of them.
const (
	Root    = "/var/lib/ingot"
	RunRoot = "/run/ingot"
)

// Env is one environment: a lab on this machine.
type Env struct {
	Format   int          `yaml:"format"`
	Name     string       `yaml:"name"`
	Subnet   netip.Prefix `yaml:"subnet"`
	Uplink   netip.Prefix `yaml:"uplink"` // between this machine and the hub
	Machines []Machine    `yaml:"machines"`
	// Started says that the first microVMs were made: those that were deleted
	// since don't come back.
	Started bool `yaml:"started"`
}

// Machine is a machine of the environment.
type Machine struct {
	Name    string     `yaml:"name"`
	Address netip.Addr `yaml:"address"`
	Hub     bool       `yaml:"hub,omitempty"`
}

const (
	format   = 1
	fileName = "environment.yaml"
)

// Default is the lab that `ingot up` makes where nothing else is said.
func Default(name string) Env {
	e := Env{Format: format, Name: name, Uplink: netip.MustParsePrefix("100.64.0.0/30")}
	e.setSubnet(netip.MustParsePrefix("192.168.10.0/25"))
	return e
}

// setSubnet numbers the machines: the hub is .2, hosts follow from .3.
func (e *Env) setSubnet(p netip.Prefix) {
	e.Subnet = p
	at := func(n int) netip.Addr {
		a := p.Masked().Addr()
		for range n {
			a = a.Next()
		}
		return a
	}
	e.Machines = []Machine{
		{Name: "network-hub", Address: at(2), Hub: true},
		{Name: "host-0", Address: at(3)},
		{Name: "host-1", Address: at(4)},
	}
}

// dhcpRange is what guests are given: from .26 on, so that machines, and one
// address for a cluster (.25), have room below.
func (e Env) dhcpRange() (first, last netip.Addr) {
	first = e.Subnet.Masked().Addr()
	for range 26 {
		first = first.Next()
	}
	last = first
	for e.Subnet.Contains(last.Next().Next()) { // the last one is for broadcasts
		last = last.Next()
	}
	return first, last
}

// Dir is where the environment's files are.
func (e Env) Dir() string { return filepath.Join(Root, e.Name) }

// RunDir is where its run-time state is.
func (e Env) RunDir() string { return filepath.Join(RunRoot, e.Name) }

// Hub is the network hub.
func (e Env) Hub() Machine {
	for _, m := range e.Machines {
		if m.Hub {
			return m
		}
	}
	return Machine{}
}

// Hosts are the microVM hosts.
func (e Env) Hosts() []Machine {
	var hosts []Machine
	for _, m := range e.Machines {
		if !m.Hub {
			hosts = append(hosts, m)
		}
	}
	return hosts
}

// Open reads an environment that was brought up on this machine.
func Open(name string) (Env, error) {
	path := filepath.Join(Root, name, fileName)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return Env{}, fmt.Errorf("open environment %s: there is none; bring it up with `ingot up`: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return Env{}, fmt.Errorf("open environment %s: %w", name, err)
	}
	var e Env
	if err := yaml.UnmarshalWithOptions(b, &e, yaml.Strict()); err != nil {
		return Env{}, fmt.Errorf("read %s: %w", path, err)
	}
	if e.Format != format || e.Name != name || e.Hub().Name == "" {
		return Env{}, fmt.Errorf("read %s: it is not the format %d file of environment %s: %w", path, format, name, errdefs.ErrInvalidArgument)
	}
	return e, nil
}

func (e Env) save() error {
	b, err := yaml.Marshal(e)
	if err != nil {
		return err
	}
	path := filepath.Join(e.Dir(), fileName)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Token is what the environment's services want to hear.
func (e Env) Token() (pki.Secret, error) {
	b, err := os.ReadFile(filepath.Join(e.Dir(), "token"))
	if err != nil {
		return "", fmt.Errorf("read token of environment %s: %w", e.Name, err)
	}
	return pki.Secret(strings.TrimSpace(string(b))), nil
}

// CAFile is the certificate of the environment's CA.
func (e Env) CAFile() string { return filepath.Join(e.Dir(), "client", "ca.pem") }

// RegistryAddress is the environment's image registry.
func (e Env) RegistryAddress() string {
	return netip.AddrPortFrom(e.Hub().Address, hub.RegistryPort).String()
}

// Target is how a machine's service is dialled.
func (e Env) Target(m Machine) (wire.Target, error) {
	token, err := e.Token()
	if err != nil {
		return wire.Target{}, err
	}
	port := uint16(hub.HostPort)
	if m.Hub {
		port = hub.GRPCPort
	}
	return wire.Target{
		Address: netip.AddrPortFrom(m.Address, port).String(), TLS: pki.In(filepath.Join(e.Dir(), "client")), Token: token,
	}, nil
}

// Lab is the lab that the environment is.
func (e Env) Lab(binary string) *lab.Lab {
	c := lab.Config{
		Name: e.Name, Dir: e.Dir(), RunDir: e.RunDir(), Binary: binary, Subnet: e.Subnet, Uplink: e.Uplink,
	}
	for _, m := range e.Machines {
		roles := []lab.Role{{Name: "containerd", Args: []string{"containerd"}}, {Name: "flintlockd", Args: []string{"host"}}}
		if m.Hub {
			roles = []lab.Role{{Name: "hub", Args: []string{"hub"}}}
		}
		c.Machines = append(c.Machines, lab.Machine{Name: m.Name, Address: m.Address, Hub: m.Hub, Roles: roles})
	}
	return lab.New(c)
}
