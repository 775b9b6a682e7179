package hub

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/dhcp"
)

// DHCP is what clients get beside an address of the range.
type DHCP struct {
	Network `yaml:",inline"` // the segment's; Ranges are further ones
	Subnets []Subnet         `yaml:"subnets,omitempty"`
}

// Subnet is a network behind a relay.
type Subnet struct {
	Prefix  netip.Prefix `yaml:"subnet"`
	Network `yaml:",inline"`
}

// Network is what the DHCP server gives in a network. What is left out is as usual: the
// router is the hub in the segment, and nobody behind a relay; the name server is the hub
// and the domain the environment's. Behind a relay lease times, name servers, domain and
// time servers that are left out are the segment's.
type Network struct {
	Ranges  []Range        `yaml:"ranges,omitempty"`
	Exclude []netip.Prefix `yaml:"exclude,flow,omitempty"` // given to nobody, nor kept for anybody
	Lease   LeaseTimes     `yaml:"lease,flow,omitempty"`
	Routers []netip.Addr   `yaml:"routers,flow,omitempty"`
	DNS     []netip.Addr   `yaml:"dns,flow,omitempty"`
	Domain  string         `yaml:"domain,omitempty"`
	NTP     []netip.Addr   `yaml:"ntp,flow,omitempty"`
	MTU     uint16         `yaml:"mtu,omitempty"`
	Routes  []Route        `yaml:"routes,omitempty"`
	Options []Option       `yaml:"options,omitempty"`
}

// LeaseTimes are how long leases are: of clients that don't ask for a time, and of those
// that do. Zero ones are as usual.
type LeaseTimes struct {
	Default time.Duration `yaml:"default,omitempty"`
	Min     time.Duration `yaml:"min,omitempty"`
	Max     time.Duration `yaml:"max,omitempty"`
}

// Or is l, and others where it does not say.
func (l LeaseTimes) Or(others LeaseTimes) LeaseTimes {
	for _, x := range []struct{ own, other *time.Duration }{{&l.Default, &others.Default}, {&l.Min, &others.Min}, {&l.Max, &others.Max}} {
		if *x.own == 0 {
			*x.own = *x.other
		}
	}
	return l
}

// UsualLease is what lease times are where nobody says.
func UsualLease() LeaseTimes {
	return LeaseTimes{dhcp.DefaultLease, dhcp.MinLease, dhcp.MaxLease}
}

// Range is the addresses from First to Last.
type Range struct {
	First netip.Addr `yaml:"first"`
	Last  netip.Addr `yaml:"last"`
}

// Valid says whether both ends are there.
func (r Range) Valid() bool { return r.First.IsValid() && r.Last.IsValid() }

// Contains says whether an address is in it.
func (r Range) Contains(a netip.Addr) bool {
	return r.Valid() && !a.Less(r.First) && !r.Last.Less(a)
}

// Size is how many addresses it has.
func (r Range) Size() uint64 { return uint64(number(r.Last)) - uint64(number(r.First)) + 1 }

func number(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()) }

func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	return fmt.Sprintf("%s - %s", r.First, r.Last)
}

// Route is a way that clients have to a network, beside the router's.
type Route struct {
	To  netip.Prefix `yaml:"to"`
	Via netip.Addr   `yaml:"via"` // 0.0.0.0: on the link (RFC 3442)
}

func (r Route) String() string { return fmt.Sprintf("%s via %s", r.To, r.Via) }

// Option is any other option, by its number.
type Option struct {
	Code  uint8    `yaml:"code"`
	Type  string   `yaml:"type,omitempty"` // how Value is written: as dhcp.ParseOption has it
	Value []string `yaml:"value,flow"`
}

// Reservation is an address that is kept for a microVM, a card or a client that calls itself so.
type Reservation struct {
	MicroVM  string     `yaml:"microvm,omitempty"`   // NAMESPACE/NAME
	MAC      string     `yaml:"mac,omitempty"`       // as net.HardwareAddr writes it
	ClientID string     `yaml:"client-id,omitempty"` // bytes: 01:02:00:00:00:00:0a
	Address  netip.Addr `yaml:"address"`
}

// Client names whoever an address is kept for; empty: nobody.
func (r Reservation) Client() string {
	switch {
	case r.MicroVM != "":
		return "microVM " + r.MicroVM
	case r.ClientID != "":
		return "client id " + r.ClientID
	}
	return r.MAC
}

func (r Reservation) client() (dhcp.Reservation, error) {
	mac, err := net.ParseMAC(r.MAC)
	if r.MAC != "" && (err != nil || len(mac) != 6) {
		return dhcp.Reservation{}, fmt.Errorf("reservations: mac: %q is no card's address: %w", r.MAC, errdefs.ErrInvalidArgument)
	}
	id, err := hex.DecodeString(strings.ReplaceAll(r.ClientID, ":", ""))
	if err != nil {
		return dhcp.Reservation{}, fmt.Errorf("reservations: client-id: %q is not bytes: %w", r.ClientID, errdefs.ErrInvalidArgument)
	}
	return dhcp.Reservation{IP: r.Address, MicroVM: r.MicroVM, MAC: mac, ClientID: id}, nil
}

// subnet is what package dhcp serves of a network.
func (n Network) subnet(p netip.Prefix, usual dhcp.Options) (dhcp.Subnet, error) {
	s := dhcp.Subnet{
		Prefix: p, Exclude: slices.Clip(n.Exclude), DefaultLease: n.Lease.Default, MinLease: n.Lease.Min, MaxLease: n.Lease.Max,
		Options: dhcp.Options{Routers: n.Routers, DNS: n.DNS, Domain: n.Domain, NTP: n.NTP, MTU: n.MTU, More: map[uint8][]byte{}},
	}
	for _, r := range n.Ranges {
		s.Ranges = append(s.Ranges, dhcp.Range{First: r.First, Last: r.Last})
	}
	for _, r := range n.Routes {
		s.Options.Routes = append(s.Options.Routes, dhcp.Route{To: r.To, Via: r.Via})
	}
	for _, o := range n.Options {
		value, err := dhcp.ParseOption(o.Code, o.Type, o.Value)
		if err != nil {
			return s, fmt.Errorf("dhcp: subnet %s: %w", p, err)
		}
		s.Options.More[o.Code] = value
	}
	s.Options = s.Options.Or(usual)
	return s, nil
}

// Bytes is how many there are in a message of what a network's clients are told.
func (n Network) Bytes() int {
	s, err := n.subnet(netip.Prefix{}, dhcp.Options{})
	if err != nil {
		return 0
	}
	return s.Options.Size()
}

// addresses are what the configuration has the DHCP server give.
func (c Config) addresses() (dhcp.Config, error) {
	own := c.DHCP.Network
	own.Ranges = slices.Concat([]Range{{c.First, c.Last}}, own.Ranges)
	own.Lease = LeaseTimes{} // all others have them, too
	segment, err := own.subnet(c.Subnet, dhcp.Options{Routers: []netip.Addr{c.Address}, DNS: []netip.Addr{c.Address}, Domain: c.Domain})
	if err != nil {
		return dhcp.Config{}, err
	}
	for _, m := range c.Machines {
		segment.Exclude = append(segment.Exclude, netip.PrefixFrom(m.Address, m.Address.BitLen()))
	}
	times := c.DHCP.Lease
	serves := dhcp.Config{
		Interface: c.Interface, Server: c.Address, Authoritative: true, Subnets: []dhcp.Subnet{segment},
		DefaultLease: times.Default, MinLease: times.Min, MaxLease: times.Max,
		LeaseFile: leasesFile, ConfigFile: dhcpConfigFile, DefaultsFile: dhcpDefaultsFile,
	}
	usual := dhcp.Options{DNS: segment.Options.DNS, Domain: segment.Options.Domain, NTP: segment.Options.NTP}
	for _, n := range c.DHCP.Subnets {
		s, err := n.subnet(n.Prefix, usual)
		if err != nil {
			return dhcp.Config{}, err
		}
		serves.Subnets = append(serves.Subnets, s)
	}
	for _, r := range c.Reservations {
		kept, err := r.client()
		if err != nil {
			return dhcp.Config{}, err
		}
		serves.Reservations = append(serves.Reservations, kept)
	}
	return serves, nil
}

// dhcpConfig is what the hub's own configuration says of DHCP.
func (h *Hub) dhcpConfig() (dhcp.Config, error) {
	c, err := h.c.addresses()
	c.MicroVM, c.Taken, c.Log = h.microVM, h.taken, h.log
	return c, err
}
