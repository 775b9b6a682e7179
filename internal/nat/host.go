package nat

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Host is what a microVM host refuses its guests.
type Host struct {
	// Segment is the segment's interface. Empty: an operator's own network, where
	// only the guests' metadata interfaces are ours to guard.
	Segment string
	MAC     net.HardwareAddr // its address: other frames from Port are macvtap guests'
	Bridge  string           // the guests' bridge; empty: none
	Port    string           // Segment's other end, a port of Bridge; empty: there is none
	// Platform are the addresses of the environment's machines, which guests
	// reach only for names, addresses and images, and these only at Hub.
	Platform   []netip.Addr
	Hub        netip.Addr
	Trusted    netip.Prefix // who else reaches Management; zero: nobody
	Peers      netip.Prefix // of the hub's VPN, who do so too; zero: nobody
	Management []uint16     // TCP ports
}

// The beginnings of the names of guests' interfaces.
const (
	tap     = "fltap"
	macvtap = "flvtap"
)

// tables are the host's: what reaches this machine, what taps may send, and what
// macvtaps may. A table that is not wanted is nil.
func (h Host) tables(k known) (map[nftables.TableFamily]*batch, error) {
	tables := map[nftables.TableFamily]*batch{nftables.TableFamilyINet: nil, nftables.TableFamilyBridge: nil, nftables.TableFamilyNetdev: nil}
	var err error
	if tables[nftables.TableFamilyINet], err = h.inputTable(); err != nil || h.Segment == "" {
		return tables, err
	}
	if tables[nftables.TableFamilyBridge], err = h.bridgeTable(k); err != nil {
		return tables, err
	}
	tables[nftables.TableFamilyNetdev], err = h.macvtapTable(k)
	return tables, err
}

func (h Host) inputTable() (*batch, error) {
	b, err := begin(nftables.TableFamilyINet, Table)
	if err != nil {
		return nil, err
	}
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	// What comes from a tap that is no bridge's port comes from a guest's metadata
	// interface. Without this, the guest could reach any address of this machine
	// through it.
	metadata := b.chain("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	service := netip.MustParsePrefix("169.254.169.254/32")
	b.rule(metadata, "metadata", iif(tap+"*"), ipv4(), destination(service), port(unix.IPPROTO_TCP, 80), accept)
	b.rule(metadata, "nothing else by the metadata interface", iif(tap+"*"), drop)
	if h.Segment == "" {
		return b, nil
	}
	platform := b.addresses("platform", h.Platform)
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	if h.Bridge != "" {
		b.rule(input, "no guest's frame is for this machine by way of the bridge", iif(h.Bridge), drop)
	}
	for _, number := range h.Management {
		to := func(who string) string { return fmt.Sprintf("%s to %d", who, number) }
		b.rule(input, to("this machine"), iif("lo"), port(unix.IPPROTO_TCP, number), accept)
		b.rule(input, to("machines"), iif(h.Segment), ipv4(), sourceIn(platform), port(unix.IPPROTO_TCP, number), accept)
		if h.Trusted.IsValid() {
			b.rule(input, to("trusted"), ipv4(), source(h.Trusted), port(unix.IPPROTO_TCP, number), accept)
		}
		if h.Peers.IsValid() {
			b.rule(input, to("peers"), ipv4(), source(h.Peers), port(unix.IPPROTO_TCP, number), accept)
		}
		b.rule(input, to("nobody else"), port(unix.IPPROTO_TCP, number), drop) // by IPv6 neither
	}
	return b, nil
}

// bridgeTable is what guests on taps are held to, on whichever bridge.
func (h Host) bridgeTable(k known) (*batch, error) {
	b, err := begin(nftables.TableFamilyBridge, Table)
	if err != nil {
		return nil, err
	}
	platform := b.addresses("platform", h.Platform)
	s := k.sets(b, tap)
	identity, guest, lease := b.identity(expr.MetaKeyIIFNAME, s, platform), b.plainChain("guest"), b.lease(expr.MetaKeyOIFNAME, s)
	h.guestRules(b, guest, platform)
	// Before the bridge takes the frame for itself, too. (That it learns no forged
	// address, also from frames that pass no hook, is link.Tap's.)
	first := b.chain("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	b.rule(first, "guests", iif(tap+"*"), jump(identity))
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	b.rule(forward, "guests", iif(tap+"*"), jump(guest))
	if h.Port != "" {
		b.rule(forward, "macvtap guests", iif(h.Port), etherSourceNot(h.MAC), jump(guest))
	}
	b.rule(forward, "leases", oif(tap+"*"), acknowledgement(), card(expr.MetaKeyOIFNAME, expr.PayloadBaseTransportHeader, dhcpCard, s.guests, false), jump(lease))
	return b, nil
}

// macvtapTable is what guests on macvtaps are held to. What they send to each
// other and to the segment passes no bridge; each device has a chain of its own
// where frames leave it. nil: there are no such guests.
func (h Host) macvtapTable(k known) (*batch, error) {
	var devices []string
	for device := range k.guests {
		if _, err := link.Get(device); err == nil && strings.HasPrefix(device, macvtap) {
			devices = append(devices, device)
		}
	}
	if len(devices) == 0 {
		return nil, nil
	}
	b, err := begin(nftables.TableFamilyNetdev, Table)
	if err != nil {
		return nil, err
	}
	platform := b.addresses("platform", h.Platform)
	s := k.sets(b, macvtap)
	identity, guest, lease := b.identity(expr.MetaKeyOIFNAME, s, platform), b.plainChain("guest"), b.lease(expr.MetaKeyIIFNAME, s)
	h.guestRules(b, guest, platform)
	for _, device := range devices {
		at := func(name string, hook *nftables.ChainHook) *nftables.Chain {
			policy := nftables.ChainPolicyAccept
			return b.add(&nftables.Chain{
				Name: name, Device: device, Type: nftables.ChainTypeFilter,
				Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &policy,
			})
		}
		out, in := at(device, nftables.ChainHookEgress), at(device+"-in", nftables.ChainHookIngress)
		b.rule(out, "identity", jump(identity))
		b.rule(out, "guest", jump(guest))
		b.rule(in, "leases", acknowledgement(), card(expr.MetaKeyIIFNAME, expr.PayloadBaseTransportHeader, dhcpCard, s.guests, false), jump(lease))
	}
	return b, nil
}

// guestRules drop what no guest may send, and let little reach the machines.
func (h Host) guestRules(b *batch, c *nftables.Chain, platform *nftables.Set) {
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	v4, v6 := etherType(unix.ETH_P_IP), etherType(unix.ETH_P_IPV6)
	b.rule(c, "no routers", v6, icmp6(routerAdvertisement), drop)
	b.rule(c, "no routers' redirects", v6, icmp6(redirect), drop)
	// Clients look at the port that an answer goes to, not where it came from.
	b.rule(c, "no DHCPv6 servers", v6, port(unix.IPPROTO_UDP, 546), drop)
	b.rule(c, "no DHCPv6 servers' port", v6, udpFrom(547), drop)
	b.rule(c, "no DHCP servers", v4, port(unix.IPPROTO_UDP, 68), drop)
	b.rule(c, "no DHCP servers' port", v4, udpFrom(67), drop)
	b.rule(c, "no link-local addresses", v4, destination(netip.MustParsePrefix("169.254.0.0/16")), drop)
	if len(h.MAC) > 0 {
		b.rule(c, "no IPv6 to this machine", v6, etherTo(h.MAC), drop)
	}
	b.rule(c, "the world and each other", v4, destinationNotIn(platform), accept)
	if h.Hub.IsValid() {
		hub := destination(netip.PrefixFrom(h.Hub, 32))
		for _, s := range segmentServices {
			b.rule(c, fmt.Sprintf("the hub's %s %d", s.name, s.port), v4, hub, port(s.protocol, s.port), accept)
		}
	}
	b.rule(c, "ping", v4, l4proto(unix.IPPROTO_ICMP), accept)
	// An answer to what the platform asked: `ssh`, a published port, a probe.
	b.rule(c, "answers", v4, whole(), l4proto(unix.IPPROTO_TCP), acknowledges(), accept)
	b.rule(c, "nothing else to machines", v4, drop)
}
