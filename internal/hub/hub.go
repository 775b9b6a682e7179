// Package hub is an environment's network hub: addresses, names, the way out and in,
// and images, as parts that run side by side on one interface. A part that fails
// ends the hub, with the reason; whoever started it starts it again.
package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"ingot/internal/dhcp"
	"ingot/internal/dns"
	"ingot/internal/nat"
	"ingot/internal/pki"
	"ingot/internal/registry"
	"ingot/internal/run"
	"ingot/internal/tailscale"
	"ingot/internal/vpn"
	"ingot/internal/wire"
)

// Ports of the hub's services, on its address on the segment.
const (
	GRPCPort     = 9091
	HostPort     = 9090 // of the hosts
	MetricsPort  = 9092 // of the hosts
	OwnMetrics   = 9093 // the hub's: one machine may be hub and host
	RegistryPort = 5000
)

// Config is the hub's configuration file.
type Config struct {
	Format    int          `yaml:"format"`
	Interface string       `yaml:"interface"` // the segment's
	Uplink    string       `yaml:"uplink"`
	Address   netip.Addr   `yaml:"address"`
	Subnet    netip.Prefix `yaml:"subnet"`
	First     netip.Addr   `yaml:"range-first"`
	Last      netip.Addr   `yaml:"range-last"`
	Trusted   netip.Prefix `yaml:"trusted"` // who reaches the segment from the uplink
	Machines  []Machine    `yaml:"machines"`
	Domain    string       `yaml:"domain"`
	Upstreams []string     `yaml:"dns-upstreams"` // resolvers: ADDRESS, or ADDRESS:PORT
	PKI       string       `yaml:"pki"`           // directory of ca.pem, cert.pem, key.pem
	TokenFile string       `yaml:"token-file"`
	Registry  string       `yaml:"registry"` // directory
	VPN       *VPN         `yaml:"vpn,omitempty"`
	Tailscale *Tailscale   `yaml:"tailscale,omitempty"`

	DHCP         DHCP           `yaml:"dhcp,omitempty"`
	Reservations []Reservation  `yaml:"reservations,omitempty"`
	Metrics      netip.AddrPort `yaml:"metrics-endpoint"` // where to tell Prometheus; zero: nowhere

	file    string
	version string
}

// Machine is a machine of the environment.
type Machine struct {
	Name    string     `yaml:"name"`
	Address netip.Addr `yaml:"address"`
	Host    bool       `yaml:"host,omitempty"` // it has microVMs, and tells of them
}

// VPN is how operators' devices come in.
type VPN struct {
	Subnet   netip.Prefix `yaml:"subnet"`             // theirs; the first address is the hub's
	Port     uint16       `yaml:"port"`               // UDP
	Endpoint string       `yaml:"endpoint,omitempty"` // HOST:PORT that they are told; empty: the uplink's address
}

// Default is what a configuration starts from.
func Default() Config {
	return Config{
		Format: 1, Interface: "bond0.1000", Uplink: "bond0", PKI: "/etc/ingot/pki", TokenFile: "/etc/ingot/token",
		Registry: "/var/lib/ingot/registry",
	}
}

// domainRule and mostDomain are what names of machines and microVMs can stand before: the
// 253 letters of a name have room for NAME.NAMESPACE.
var domainRule = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63})*$`)

const mostDomain = 253 - 2*64

// ValidDomain says whether there can be names in a domain.
func ValidDomain(name string) bool { return len(name) <= mostDomain && domainRule.MatchString(name) }

// ReadConfig reads the configuration file. An unknown key is an error.
func ReadConfig(path, version string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Default(), fmt.Errorf("read configuration: %w", err)
	}
	c, err := ParseConfig(b)
	c.file, c.version = path, version
	if err != nil {
		return c, fmt.Errorf("read %s: %w", path, err)
	}
	return c, nil
}

// ParseConfig reads what a configuration file has.
func ParseConfig(text []byte) (Config, error) {
	c := Default()
	if err := yaml.UnmarshalWithOptions(text, &c, yaml.Strict()); err != nil {
		return c, err
	}
	var err error
	switch {
	case c.Format != 1:
		err = fmt.Errorf("format: %d is not known to this version", c.Format)
	case !isInterface(c.Interface):
		err = fmt.Errorf("interface: %q is no interface's name", c.Interface)
	case !isInterface(c.Uplink):
		err = fmt.Errorf("uplink: %q is no interface's name", c.Uplink)
	case c.Subnet != c.Subnet.Masked():
		err = fmt.Errorf("subnet: %s has bits after its prefix: is it %s?", c.Subnet, c.Subnet.Masked())
	case !c.Subnet.IsValid() || !c.Subnet.Contains(c.Address):
		err = fmt.Errorf("address: %s is not in subnet %s", c.Address, c.Subnet)
	case !c.Subnet.Contains(c.First) || !c.Subnet.Contains(c.Last) || c.Last.Less(c.First):
		err = fmt.Errorf("range-first, range-last: %s - %s is no range in %s", c.First, c.Last, c.Subnet)
	case c.Trusted.IsValid() && !c.Trusted.Addr().Is4():
		err = fmt.Errorf("trusted: %s is no IPv4 prefix", c.Trusted)
	case c.Domain == "":
		err = errors.New("domain: it is missing")
	case !ValidDomain(c.Domain):
		err = fmt.Errorf("domain: %q is not a name such as lab.internal", c.Domain)
	}
	if err == nil && c.VPN != nil {
		err = c.VPN.check(c.Subnet)
	}
	if err == nil && c.Tailscale != nil {
		err = c.Tailscale.check(c)
	}
	for i, text := range c.Upstreams {
		at, bad := dns.ParseUpstream(text)
		if bad != nil && err == nil {
			err = fmt.Errorf("dns-upstreams: %w", bad)
		}
		if at.Addr() == c.Address && err == nil {
			err = fmt.Errorf("dns-upstreams: %s is the hub itself", at.Addr())
		}
		c.Upstreams[i] = at.String()
	}
	for _, m := range c.Machines {
		if !m.Address.Is4() && err == nil {
			err = fmt.Errorf("machines: %s of %s is no IPv4 address", m.Address, m.Name)
		}
	}
	if err != nil {
		return c, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	serves, err := c.addresses()
	if err == nil {
		_, err = dhcp.New(serves)
	}
	return c, err
}

// isInterface says whether the kernel lets an interface have a name.
func isInterface(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) < unix.IFNAMSIZ && !strings.ContainsAny(name, "/: \t\r\n\v\f")
}

func (v VPN) check(segment netip.Prefix) error {
	switch {
	case !v.Subnet.IsValid() || !v.Subnet.Addr().Is4() || v.Subnet.Bits() > 30:
		return fmt.Errorf("vpn: subnet: %s is no IPv4 prefix with room for peers", v.Subnet)
	case v.Subnet.Overlaps(segment):
		return fmt.Errorf("vpn: subnet: %s overlaps with %s", v.Subnet, segment)
	case v.Port == 0:
		return errors.New("vpn: port: it is missing")
	case v.Port == 53 || v.Port == 67:
		return fmt.Errorf("vpn: port: the hub serves something else at %d", v.Port)
	}
	return nil
}

// Hub is a network hub. New only allocates.
type Hub struct {
	c        Config
	log      *slog.Logger
	token    pki.Secret
	shown    *pki.Credentials
	began    time.Time
	dhcp     *dhcp.Server
	dns      *dns.Server
	registry *registry.Server
	guests   *guests
	heard    run.Task // has the guests hear hosts
	access   *accesses
	vpn      *vpn.Server       // nil: nobody comes in
	tailnet  *tailscale.Router // nil: nor by Tailscale
	again    chan struct{}     // a new configuration has come
}

// New makes a hub of its configuration.
func New(c Config, log *slog.Logger) (*Hub, error) {
	token, err := pki.ReadToken(c.TokenFile)
	if err != nil {
		return nil, err
	}
	shown, err := pki.In(c.PKI).Open(log)
	if err != nil {
		return nil, err
	}
	h := &Hub{c: c, log: log, token: token, shown: shown, began: time.Now(), again: make(chan struct{}, 1)}
	h.guests = newGuests(c.Machines, guestsFile, h.dial, log)
	h.heard = run.Func("microvms", h.guests.run)
	text, err := imported()
	if err != nil {
		return nil, err
	}
	serves, _, err := h.beside(text) // what is left was told when it was imported
	if err != nil {
		return nil, fmt.Errorf("%s: %w", importedFile, err)
	}
	if h.dhcp, err = dhcp.New(serves); err != nil {
		return nil, err
	}
	names := []netip.Prefix{c.Subnet, netip.PrefixFrom(c.Address, 32)}
	for _, n := range c.DHCP.Subnets {
		names = append(names, n.Prefix)
	}
	if v := c.VPN; v != nil {
		names = append(names, v.Subnet)
		h.vpn = vpn.New(vpn.Settings{Dir: vpnDir, Interface: vpnInterface, Subnet: v.Subnet, Port: v.Port, Log: log})
	}
	if c.Tailscale != nil {
		names = append(names, tailscale.Addresses)
		h.tailnet = h.newTailnet()
	}
	h.access = h.newAccesses()
	port := func(p uint16) netip.AddrPort { return netip.AddrPortFrom(c.Address, p) }
	h.dns = dns.New(dns.Config{
		Listen: []netip.AddrPort{port(53)}, Allow: names,
		Upstreams: c.Upstreams, Domain: c.Domain, Server: h.ownName(), Reverse: []netip.Prefix{c.Subnet},
		Lookup: h.lookup, NameOf: h.nameOf, Log: log,
	})
	files := pki.In(c.PKI)
	h.registry, err = registry.New(registry.Config{
		Dir: c.Registry, Listen: port(RegistryPort).String(), CertFile: files.Cert, KeyFile: files.Key,
		User: "ingot", Password: string(h.token), Log: log,
	})
	return h, err
}

// The files of the DHCP server, where isc-dhcp-server has them.
const (
	leasesFile       = "/var/lib/dhcp/dhcpd.leases"
	dhcpConfigFile   = "/etc/dhcp/dhcpd.conf"
	dhcpDefaultsFile = "/etc/default/isc-dhcp-server"
)

// The microVMs that the hub knows.
const guestsFile = "/var/lib/ingot/guests.json"

// What some of them have more than others.
const accessFile = "/var/lib/ingot/access.json"

// What the VPN keeps, and its interface.
const (
	vpnDir       = "/var/lib/ingot/vpn"
	vpnInterface = "vpn0"
)

// Run serves until ctx ends or a part fails, beside other tasks that are parts of it.
func (h *Hub) Run(ctx context.Context, others ...run.Task) error {
	if err := h.access.load(); err != nil {
		return err
	}
	if err := h.access.change(func(all []access) ([]access, error) { return all, nil }); err != nil {
		return err
	}
	if err := h.passOthers(); err != nil {
		return err
	}
	tasks := []run.Task{h.heard, run.Func("access", h.access.follow), run.Func("leases of microvms", h.forget), h.dhcp, h.dns, h.registry, run.Func("grpc api", h.serve), run.Func("certificates", func(ctx context.Context, ready func()) error {
		ready()
		return h.shown.Run(ctx)
	})}
	tasks = append(tasks, run.Func("configuration", h.awaitConfig), run.Func("firewalld", h.keepFirewalld))
	if h.vpn != nil {
		tasks = append(tasks, h.vpn)
	} else if err := vpn.Forget(vpnDir, vpnInterface); err != nil {
		return err
	}
	tasks = append(tasks, h.tailnetTasks()...)
	return run.All(ctx, h.log, append(tasks, others...)...)
}

// dial is a new connection to a host's API.
func (h *Hub) dial(m Machine) (*grpc.ClientConn, error) {
	return wire.Dial(wire.Target{Address: netip.AddrPortFrom(m.Address, HostPort).String(), TLS: pki.In(h.c.PKI), Token: h.token})
}

// newAccesses are those of the hub's microVMs.
func (h *Hub) newAccesses() *accesses {
	return &accesses{
		file: accessFile, guests: h.guests, leases: h.dhcp.Changes(), log: h.log, failed: true,
		address: func(g *guest) (netip.Addr, bool) {
			select {
			case <-h.dhcp.Ready():
				return h.address(g), true
			default:
				return netip.Addr{}, false // the log of leases is not read yet
			}
		},
		set: func(x inForce) error { return nat.SetHub(h.rules(x)) }, cut: nat.Cut,
	}
}

func (h *Hub) rules(x inForce) nat.Hub {
	rules := nat.Hub{
		Inside: h.c.Interface, Outside: h.c.Uplink, Trusted: h.c.Trusted,
		Platform: h.platform(), Management: []uint16{GRPCPort},
		Segment: h.c.Subnet, Published: x.published, Restricted: x.restricted,
	}
	if h.c.Metrics.IsValid() {
		rules.Management = append(rules.Management, h.c.Metrics.Port())
	}
	if v := h.c.VPN; v != nil {
		rules.VPN = nat.VPN{Interface: vpnInterface, Subnet: v.Subnet, Port: v.Port}
	}
	if h.c.Tailscale != nil {
		rules.Tailnet = nat.VPN{Interface: tailscale.Interface, Subnet: tailscale.Addresses, Port: tailscale.Port}
	}
	return rules
}

func (h *Hub) platform() []netip.Addr {
	addrs := []netip.Addr{h.c.Address}
	for _, m := range h.c.Machines {
		addrs = append(addrs, m.Address)
	}
	return addrs
}
