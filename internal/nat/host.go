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

// guests are the cards that guests have: by device, the MAC address that is theirs.
type guests map[string]net.HardwareAddr

// tables are the host's: what reaches this machine, what taps may send, and what
// macvtaps may. A table that is not wanted is nil.
func (h Host) tables(g guests) (map[nftables.TableFamily]*batch, error) {
	tables := map[nftables.TableFamily]*batch{nftables.TableFamilyINet: nil, nftables.TableFamilyBridge: nil, nftables.TableFamilyNetdev: nil}
	var err error
	if tables[nftables.TableFamilyINet], err = h.inputTable(); err != nil || h.Segment == "" {
		return tables, err
	}
	if tables[nftables.TableFamilyBridge], err = h.bridgeTable(g); err != nil {
		return tables, err
	}
	tables[nftables.TableFamilyNetdev], err = h.macvtapTable(g)
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
func (h Host) bridgeTable(g guests) (*batch, error) {
	b, err := begin(nftables.TableFamilyBridge, Table)
	if err != nil {
		return nil, err
	}
	platform := b.addresses("platform", h.Platform)
	identity, guest := b.plainChain("identity"), b.plainChain("guest")
	h.identityRules(b, identity, expr.MetaKeyIIFNAME, b.guests(g, tap), platform)
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
	return b, nil
}

// macvtapTable is what guests on macvtaps are held to. What they send to each
// other and to the segment passes no bridge; each device has a chain of its own
// where frames leave it. nil: there are no such guests.
func (h Host) macvtapTable(g guests) (*batch, error) {
	var devices []string
	for device := range g {
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
	identity, guest := b.plainChain("identity"), b.plainChain("guest")
	h.identityRules(b, identity, expr.MetaKeyOIFNAME, b.guests(g, macvtap), platform)
	h.guestRules(b, guest, platform)
	for _, device := range devices {
		policy := nftables.ChainPolicyAccept
		out := b.add(&nftables.Chain{
			Name: device, Device: device, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookEgress, Priority: nftables.ChainPriorityFilter, Policy: &policy,
		})
		b.rule(out, "identity", jump(identity))
		b.rule(out, "guest", jump(guest))
	}
	return b, nil
}

// identityRules drop what a guest sends as somebody else: with another MAC address
// in the frame, in ARP or in DHCP, or with a machine's IP address. Which IP address
// is a guest's own the network decides, and is not known here.
func (h Host) identityRules(b *batch, c *nftables.Chain, key expr.MetaKey, own, platform *nftables.Set) {
	drop := verdict(expr.VerdictDrop)
	const (
		arpSender, arpSenderIP = 8, 14  // RFC 826
		chaddr                 = 8 + 28 // after UDP's header, RFC 2131
	)
	b.rule(c, "no VLANs", tagged(unix.ETH_P_8021Q), drop)
	b.rule(c, "no VLANs of providers", tagged(unix.ETH_P_8021AD), drop)
	b.rule(c, "its own MAC", card(key, expr.PayloadBaseLLHeader, 6, own, true), drop)
	b.rule(c, "its own MAC in ARP", etherType(unix.ETH_P_ARP), card(key, expr.PayloadBaseNetworkHeader, arpSender, own, true), drop)
	b.rule(c, "no machine's address in ARP", etherType(unix.ETH_P_ARP), in(arpSenderIP, platform, false), drop)
	b.rule(c, "no machine's address", etherType(unix.ETH_P_IP), sourceIn(platform), drop)
	// This way round, what is too short to hold the address is dropped.
	request := append(etherType(unix.ETH_P_IP), port(unix.IPPROTO_UDP, 67)...)
	b.rule(c, "its own MAC in DHCP", request, whole(), card(key, expr.PayloadBaseTransportHeader, chaddr, own, false), verdict(expr.VerdictReturn))
	b.rule(c, "no other in DHCP", request, drop)
}

// guestRules drop what no guest may send, and let little reach the machines.
func (h Host) guestRules(b *batch, c *nftables.Chain, platform *nftables.Set) {
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	v4, v6 := etherType(unix.ETH_P_IP), etherType(unix.ETH_P_IPV6)
	b.rule(c, "no routers", v6, l4proto(unix.IPPROTO_ICMPV6), payload(expr.PayloadBaseTransportHeader, 0, []byte{134}), drop)
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

func jump(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}

// guests makes the set of the cards whose devices' names begin with prefix.
func (b *batch) guests(g guests, prefix string) *nftables.Set {
	var keys [][]byte
	for device, mac := range g {
		if strings.HasPrefix(device, prefix) {
			keys = append(keys, cardKey(device, mac))
		}
	}
	return b.set(guestSet(b.table), keys)
}

func guestSet(t *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: t, Name: "guests", Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr),
	}
}

// cardKey is a card as the set of guests has it: in whole registers.
func cardKey(device string, mac net.HardwareAddr) []byte {
	return append(append(ifname(device), mac...), 0, 0)
}

// card matches frames by their device and a MAC address in them.
func card(key expr.MetaKey, base expr.PayloadBase, offset uint32, s *nftables.Set, not bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Payload{DestRegister: 2, Base: base, Offset: offset, Len: 6},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: not},
	}
}
