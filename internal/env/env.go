// Package env brings an environment up and takes it down: one visible list of
// steps each. It owns the environment's directory, which holds its file, its
// certificates and its token, and knows how its services are reached.
package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"ingot/internal/doctor"
	"ingot/internal/link"
	"ingot/internal/nat"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"

	"ingot/internal/hub"
	"ingot/internal/inspect"
	"ingot/internal/lab"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// Root is where environments are kept, and RunRoot what a reboot may take of them.
const (
	Root    = "/var/lib/ingot"
	RunRoot = "/run/ingot"
)

// Env is one environment: a lab on this machine. All that its file left open is
// decided.
type Env struct {
	Name     string
	Subnet   netip.Prefix
	Uplink   netip.Prefix // between this machine and the hub
	DHCP     DHCP
	VPN      VPN
	Machines []Machine
	MicroVMs []MicroVM // those that the file declares

	Tailscale Tailscale

	Resolvers []netip.AddrPort // that the hub asks; none: this machine's
}

// Machine is a machine of the environment. It may have both roles.
type Machine struct {
	Name    string
	Address netip.Addr
	Hub     bool
	Host    bool
}

// roles are the machine's, in the file's words.
func (m Machine) roles() []string {
	var roles []string
	if m.Hub {
		roles = append(roles, "hub")
	}
	if m.Host {
		roles = append(roles, "host")
	}
	return roles
}

const fileName = "environment.yaml"

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
		if m.Host {
			hosts = append(hosts, m)
		}
	}
	return hosts
}

// DefaultName is the environment's that nobody named.
const DefaultName = "lab"

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
	e, err := readKept(path, b)
	if err != nil {
		return Env{}, err
	}
	if e.Name != name {
		return Env{}, fmt.Errorf("read %s: it is the file of environment %s: %w", path, e.Name, errdefs.ErrInvalidArgument)
	}
	return e, nil
}

// OpenUp is Open, of an environment that is up: after a reboot its files are there,
// but nobody is at its addresses, or somebody else is.
func OpenUp(name string) (Env, error) {
	e, err := Open(name)
	if err == nil && !e.Lab("").Up() {
		return Env{}, fmt.Errorf("environment %s is down: `ingot up` brings it up: %w", name, errdefs.ErrUnavailable)
	}
	return e, err
}

// readKept reads a file that save has written.
func readKept(path string, b []byte) (Env, error) {
	var version struct{ Format int }
	if yaml.Unmarshal(b, &version) == nil && version.Format == 1 {
		return readFormat1(path, b)
	}
	d, err := Parse(path, b)
	if err != nil {
		return Env{}, err
	}
	e := Env{Name: d.Name, Subnet: d.Subnet, Uplink: d.Uplink, DHCP: d.DHCP, MicroVMs: d.MicroVMs, Resolvers: d.Resolvers}
	if d.VPN != nil {
		if e.VPN = *d.VPN; !e.VPN.Subnet.IsValid() || e.VPN.Port == 0 {
			return Env{}, fmt.Errorf("read %s: vpn must have subnet and port: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	if d.Tailscale != nil {
		e.Tailscale = *d.Tailscale
	}
	if d.Name == "" || !d.Subnet.IsValid() || !d.Uplink.IsValid() {
		return Env{}, fmt.Errorf("read %s: name, subnet and uplink must be there: %w", path, errdefs.ErrInvalidArgument)
	}
	var problem *Mistake
	if e.Machines, e.DHCP.Ranges, problem = d.number(d.Subnet, nil); problem != nil {
		return Env{}, problem
	}
	return e, nil
}

// readFormat1 reads what `up` wrote before users had files: each machine was
// either the hub or a host, and the DHCP range was the usual one.
func readFormat1(path string, b []byte) (Env, error) {
	var old struct {
		Format   int
		Name     string
		Subnet   netip.Prefix
		Uplink   netip.Prefix
		Started  bool
		Machines []struct {
			Name    string
			Address netip.Addr
			Hub     bool
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&old); err != nil {
		return Env{}, fmt.Errorf("read %s: %w", path, err)
	}
	d := Declaration{source: source{file: path}}
	for _, m := range old.Machines {
		d.Machines = append(d.Machines, Machine{Name: m.Name, Address: m.Address, Hub: m.Hub, Host: !m.Hub})
	}
	e := Env{Name: old.Name, Subnet: old.Subnet, Uplink: old.Uplink}
	var problem *Mistake
	if e.Machines, e.DHCP.Ranges, problem = d.number(e.Subnet, nil); problem != nil {
		return Env{}, problem
	}
	return e, nil
}

// form is the file that save writes: Parse reads it.
type form struct {
	Format   int           `yaml:"format"`
	Name     string        `yaml:"name"`
	Subnet   netip.Prefix  `yaml:"subnet"`
	Uplink   netip.Prefix  `yaml:"uplink"`
	DHCP     dhcpForm      `yaml:"dhcp"`
	VPN      *vpnForm      `yaml:"vpn,omitempty"`
	DNS      *dnsForm      `yaml:"dns,omitempty"`
	Machines []machineForm `yaml:"machines"`
	MicroVMs []MicroVM     `yaml:"microvms,omitempty"`

	Tailscale *tailscaleForm `yaml:"tailscale,omitempty"`
}

type vpnForm struct {
	Subnet   netip.Prefix `yaml:"subnet"`
	Port     uint16       `yaml:"port"`
	Endpoint string       `yaml:"endpoint,omitempty"`
}

type tailscaleForm struct {
	KeyFile  string `yaml:"auth_key_file"`
	Server   string `yaml:"login_server,omitempty"`
	Hostname string `yaml:"hostname"`
}

type dnsForm struct {
	Upstreams []netip.AddrPort `yaml:"upstreams,flow"`
}

type machineForm struct {
	Name    string     `yaml:"name"`
	Address netip.Addr `yaml:"address"`
	Roles   []string   `yaml:"roles,flow"`
}

// marshal writes an environment as a file that says all of it.
func (e Env) marshal() ([]byte, error) {
	f := form{Format: format, Name: e.Name, Subnet: e.Subnet, Uplink: e.Uplink, DHCP: e.DHCP.form(), MicroVMs: e.MicroVMs}
	if e.VPN.On() {
		f.VPN = &vpnForm{e.VPN.Subnet, e.VPN.Port, e.VPN.Endpoint}
	}
	if t := e.Tailscale; t.On() {
		f.Tailscale = &tailscaleForm{t.KeyFile, t.Server, t.Hostname}
	}
	if len(e.Resolvers) > 0 {
		f.DNS = &dnsForm{e.Resolvers}
	}
	for _, m := range e.Machines {
		f.Machines = append(f.Machines, machineForm{m.Name, m.Address, m.roles()})
	}
	b, err := yaml.Marshal(f)
	return append([]byte("# Kept by `ingot up`. To change it: a copy, and `ingot up -f COPY`.\n"), b...), err
}

func (e Env) save() error {
	b, err := e.marshal()
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(e.Dir(), fileName), b)
}

// writeFile replaces a file in one step.
func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(path+".new", path)
}

// Token is what the environment's services want to hear.
func (e Env) Token() (pki.Secret, error) {
	b, err := os.ReadFile(filepath.Join(e.Dir(), "token"))
	if err == nil && len(bytes.TrimSpace(b)) == 0 {
		err = fmt.Errorf("it is empty: %w", os.ErrNotExist)
	}
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

// Conns are connections to an environment's services. None is made before it is used.
type Conns struct {
	Hub   *grpc.ClientConn
	Hosts map[string]*grpc.ClientConn // by machine
}

// Close closes all of them.
func (c Conns) Close() {
	if c.Hub != nil {
		c.Hub.Close()
	}
	for _, conn := range c.Hosts {
		conn.Close()
	}
}

// Dial prepares the connections to the environment's services.
func (e Env) Dial() (Conns, error) {
	c := Conns{Hosts: map[string]*grpc.ClientConn{}}
	token, err := e.Token()
	if err != nil {
		return c, err
	}
	dial := func(a netip.AddrPort) (*grpc.ClientConn, error) {
		return wire.Dial(wire.Target{Address: a.String(), TLS: pki.In(filepath.Join(e.Dir(), "client")), Token: token})
	}
	if c.Hub, err = dial(e.hubEndpoint()); err != nil {
		return c, err
	}
	for _, m := range e.Hosts() {
		if c.Hosts[m.Name], err = dial(m.hostEndpoint()); err != nil {
			c.Close()
			return Conns{}, err
		}
	}
	return c, nil
}

func (e Env) hubEndpoint() netip.AddrPort { return netip.AddrPortFrom(e.Hub().Address, hub.GRPCPort) }

func (m Machine) hostEndpoint() netip.AddrPort { return netip.AddrPortFrom(m.Address, hub.HostPort) }

// Inspection is the environment as package inspect wants it.
func (e Env) Inspection(c Conns) inspect.Environment {
	h := e.Hub()
	i := inspect.Environment{Name: e.Name, Here: e.here, Outside: outside, Hear: hear, Hub: inspect.Machine{Name: h.Name, Address: h.Address, Endpoint: e.hubEndpoint().String(), Conn: c.Hub}}
	for _, m := range e.Hosts() {
		i.Hosts = append(i.Hosts, inspect.Machine{Name: m.Name, Address: m.Address, Endpoint: m.hostEndpoint().String(), Conn: c.Hosts[m.Name]})
	}
	return i
}

// here is what the environment needs of this machine while it is up.
func (e Env) here(ctx context.Context) []inspect.Check {
	l := e.Lab("")
	supervisor := inspect.Check{Name: "supervisor", Status: inspect.Pass, Detail: "starts again what ends"}
	if !l.Supervised() {
		supervisor.Status, supervisor.Detail = inspect.Warn, "it does not run: a role that ends is not started again; `ingot up` starts it"
	}
	rules := inspect.Check{Name: "rules", Status: inspect.Pass, Detail: "nftables table " + l.Device()}
	if there, err := nat.Present(l.Device()); err != nil {
		rules.Status, rules.Detail = inspect.Warn, err.Error()
	} else if !there {
		rules.Lasting = true
		rules.Status, rules.Detail = inspect.Fail, "nftables table "+l.Device()+" is gone: nothing leaves the lab; `ingot up` sets it again"
	} else if missing, err := l.MissingRules(); err != nil {
		rules.Status, rules.Detail = inspect.Warn, err.Error()
	} else if len(missing) > 0 {
		rules.Status = inspect.Fail
		rules.Detail = "nftables table " + l.Device() + " lacks: " + strings.Join(missing, ", ") + "; `ingot up` sets it again"
	}
	all := []inspect.Check{supervisor, rules, e.checkFiles()}
	p, err := e.patient("", true)
	if err != nil {
		return append(all, inspect.Check{Name: "doctor", Status: inspect.Warn, Detail: err.Error()})
	}
	var checks []doctor.Check
	for _, c := range doctor.Checks() {
		if c.Name == "forwarding" || c.Name == "firewall" {
			checks = append(checks, c)
		}
	}
	for _, f := range doctor.Look(ctx, p, checks).Checks {
		all = append(all, diagnosis(f))
	}
	return all
}

// diagnosis is a finding of the doctor's about this machine's forwarding. Where that
// is off, or packets are dropped, which the doctor mends, nothing leaves the lab.
// What can't be seen, or a machine without a way out, is no fault of the lab's.
func diagnosis(f doctor.Finding) inspect.Check {
	c := inspect.Check{Name: f.Name, Status: inspect.Status(f.Status), Detail: f.Detail}
	switch {
	case f.Wrong() && f.Fixable:
		c.Status, c.Lasting = inspect.Fail, true
		c.Detail += "; `ingot doctor --fix " + f.Name + "`: " + f.Fix
	case f.Wrong():
		c.Status = inspect.Warn
		c.Detail += "; " + f.Fix
	}
	return c
}

// outside is this machine's own address towards the world: what reaches it has
// taken the hub's default route, and depends on nobody else.
func outside(context.Context) netip.Addr {
	routes, err := link.Routes()
	if err != nil {
		return netip.Addr{}
	}
	for _, r := range routes {
		if r.Destination.Bits() != 0 {
			continue
		}
		i, err := link.Get(r.Interface)
		if err != nil {
			continue
		}
		for _, p := range i.Addresses {
			if p.Addr().Is4() {
				return p.Addr()
			}
		}
	}
	return netip.Addr{}
}

// Where a role finds what it reads when it starts.
const (
	hubFile   = "/etc/ingot/hub.yaml"
	hostFile  = "/etc/opt/flintlockd/config.yaml"
	tokenFile = "/etc/ingot/token"
	pkiDir    = "/etc/ingot/pki"
)

// Lab is the lab that the environment is.
func (e Env) Lab(binary string) *lab.Lab {
	c := lab.Config{
		Name: e.Name, Dir: e.Dir(), RunDir: e.RunDir(), Binary: binary, Subnet: e.Subnet, Uplink: e.Uplink, VPN: e.VPN.Port,
	}
	secrets := []string{tokenFile, pkiDir + "/ca.pem", pkiDir + "/cert.pem"}
	for _, m := range e.Machines {
		var roles []lab.Role
		if m.Hub {
			files := append([]string{hubFile}, secrets...)
			if e.Tailscale.On() {
				files = append(files, hub.TailscaleKey)
			}
			roles = append(roles, lab.Role{Name: "hub", Args: []string{"hub"}, Files: files})
		}
		if m.Host {
			roles = append(roles, lab.Role{Name: "containerd", Args: []string{"containerd"}},
				lab.Role{Name: "flintlockd", Args: []string{"host"}, Files: append([]string{hostFile}, secrets...)})
		}
		c.Machines = append(c.Machines, lab.Machine{Name: m.Name, Address: m.Address, Hub: m.Hub, Host: m.Host, Roles: roles})
	}
	return lab.New(c)
}

// Others are the environments of this machine but one. What can't be read is none.
func others(name string) ([]Env, error) {
	entries, err := os.ReadDir(Root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list environments: %w", err)
	}
	var all []Env
	for _, entry := range entries {
		if entry.Name() == name || !ValidName(entry.Name()) {
			continue
		}
		if e, err := Open(entry.Name()); err == nil {
			all = append(all, e)
		}
	}
	return all, nil
}
