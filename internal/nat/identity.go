package nat

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Guest is who may send by a device.
type Guest struct {
	MAC net.HardwareAddr
	// Allowed are the addresses that it may use beside the one that DHCP gives it.
	Allowed []netip.Prefix
	// Running says that it has had its address for longer than the guard knows it.
	Running bool
}

// sets are what a table knows of guests. Each element is of one device: a guest
// costs elements, and no rule but where it has a macvtap.
type sets struct {
	guests            *nftables.Set // its MAC address
	suffixes          *nftables.Set // the last half of an IPv6 address that is made from that
	allowed, allowed6 *nftables.Set // ranges of addresses
	addresses         *nftables.Set // what DHCP has given it; the kernel's to fill
	unheld            *nftables.Set // the devices of which that is not known, until when
	refused, refused6 *nftables.Set // as whom it has tried to send, counted
}

// newSets says what the sets of a table are like.
func newSets(t *nftables.Table) sets {
	concat := func(name string, of nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, of)}
	}
	ranges := func(name string, of nftables.SetDatatype) *nftables.Set {
		s := concat(name, of)
		s.Interval = true
		return s
	}
	changing := func(s *nftables.Set, size uint32) *nftables.Set {
		s.Dynamic, s.HasTimeout, s.Size = true, true, size
		return s
	}
	return sets{
		guests: concat("guests", nftables.TypeEtherAddr), suffixes: concat("suffixes", nftables.TypeIP6Addr),
		allowed: ranges("allowed", nftables.TypeIPAddr), allowed6: ranges("allowed6", nftables.TypeIP6Addr),
		addresses: changing(concat("addresses", nftables.TypeIPAddr), 1<<16),
		unheld:    changing(&nftables.Set{Table: t, Name: "unheld", KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}, 1<<16),
		refused:   changing(concat("refused", nftables.TypeIPAddr), mostRefused),
		refused6:  changing(concat("refused6", nftables.TypeIP6Addr), mostRefused),
	}
}

const (
	// mostRefused bounds what guests can have the kernel write down.
	mostRefused = 1 << 12
	// refusedTime is how long an attempt is told after the last one.
	refusedTime = 10 * time.Minute
)

// fixed are the sets whose elements are the guard's to change.
func (s sets) fixed() []*nftables.Set {
	return []*nftables.Set{s.guests, s.suffixes, s.allowed, s.allowed6}
}

// of are a guest's elements in one of the fixed sets.
func (s sets) of(set *nftables.Set, device string, g Guest) (elements []nftables.SetElement) {
	switch {
	case g.MAC == nil:
	case set == s.guests:
		elements = append(elements, nftables.SetElement{Key: key(device, g.MAC)})
	case set == s.suffixes:
		elements = append(elements, nftables.SetElement{Key: key(device, suffix(g.MAC))})
	default:
		for _, p := range g.Allowed {
			if p.Addr().Is4() == (set == s.allowed) {
				elements = append(elements, nftables.SetElement{Key: key(device, p.Addr().AsSlice()), KeyEnd: key(device, last(p))})
			}
		}
	}
	return elements
}

// key is a device and what belongs to it, as sets have it: in whole registers.
func key(device string, data []byte) []byte {
	k := append(ifname(device), data...)
	return append(k, make([]byte, -len(k)&3)...)
}

// keyDevice is the other way round.
func keyDevice(key []byte) string {
	device, _, _ := bytes.Cut(key[:unix.IFNAMSIZ], []byte{0})
	return string(device)
}

// suffix is an IPv6 address without its prefix, as a card with this address makes
// it for each network (RFC 4291, appendix A).
func suffix(mac net.HardwareAddr) []byte {
	return []byte{8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

// last is a prefix's last address.
func last(p netip.Prefix) []byte {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return b
}

// disjoint are the same addresses, each in one prefix: the kernel takes no ranges
// that overlap.
func disjoint(prefixes []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range prefixes {
		all = append(all, p.Masked())
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { return a.Compare(b) }) // the wider first
	var kept []netip.Prefix
	for _, p := range all {
		if !slices.ContainsFunc(kept, func(wide netip.Prefix) bool { return wide.Overlaps(p) }) {
			kept = append(kept, p)
		}
	}
	return kept
}

// sets makes the sets of the guests whose devices' names begin with prefix.
func (k known) sets(b *batch, prefix string) sets {
	s := newSets(b.table)
	for _, set := range s.fixed() {
		var elements []nftables.SetElement
		for device, g := range k.guests {
			if strings.HasPrefix(device, prefix) {
				elements = append(elements, s.of(set, device, g)...)
			}
		}
		slices.SortFunc(elements, func(a, b nftables.SetElement) int { return bytes.Compare(a.Key, b.Key) })
		b.addSet(set, elements)
	}
	var addresses, unheld []nftables.SetElement
	for device, l := range k.leases {
		if left := time.Until(l.until); left > 0 && strings.HasPrefix(device, prefix) {
			addresses = append(addresses, nftables.SetElement{Key: key(device, l.address.AsSlice()), Timeout: left})
		}
	}
	for device, until := range k.unheld {
		if left := time.Until(until); left > 0 && strings.HasPrefix(device, prefix) {
			unheld = append(unheld, nftables.SetElement{Key: ifname(device), Timeout: left})
		}
	}
	b.addSet(s.addresses, addresses)
	b.addSet(s.unheld, unheld)
	b.addSet(s.refused, nil)
	b.addSet(s.refused6, nil)
	return s
}

// Where DHCP's fields are, after UDP's header (RFC 2131).
const (
	dhcpKind    = 8      // of the message: a request or an answer
	dhcpClient  = 8 + 12 // the address that a client has
	dhcpYour    = 8 + 16 // the one that it is given
	dhcpCard    = 8 + 28
	dhcpOptions = 8 + 240
)

// IPv6's messages between neighbours (RFC 4861).
const (
	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136
	redirect               = 137
)

// identity makes the chain that drops what a guest sends as somebody else: with
// another MAC address in the frame, in ARP or in DHCP, with a machine's IP address,
// or with one that is neither allowed to it nor given to it by DHCP.
func (b *batch) identity(device expr.MetaKey, s sets, platform *nftables.Set) *nftables.Chain {
	identity6 := b.identity6(device, s)
	c := b.plainChain("identity")
	drop, pass := verdict(expr.VerdictDrop), verdict(expr.VerdictReturn)
	const arpSender, arpSenderIP = 8, 14 // RFC 826
	v4, arp := etherType(unix.ETH_P_IP), etherType(unix.ETH_P_ARP)
	b.rule(c, "no VLANs", tagged(unix.ETH_P_8021Q), drop)
	b.rule(c, "no VLANs of providers", tagged(unix.ETH_P_8021AD), drop)
	b.rule(c, "its own MAC", card(device, expr.PayloadBaseLLHeader, 6, s.guests, true), drop)
	b.rule(c, "its own MAC in ARP", arp, card(device, expr.PayloadBaseNetworkHeader, arpSender, s.guests, true), drop)
	b.rule(c, "no machine's address in ARP", arp, in(arpSenderIP, platform, false), drop)
	b.rule(c, "no machine's address", v4, sourceIn(platform), drop)
	request := append(etherType(unix.ETH_P_IP), port(unix.IPPROTO_UDP, 67)...)
	own := card(device, expr.PayloadBaseTransportHeader, dhcpCard, s.guests, false)
	b.rule(c, "it gives its address back", request, whole(), own, option(0, 53, 7), // DHCPRELEASE
		load(device, expr.PayloadBaseTransportHeader, dhcpClient, 4), change(s.addresses, deleteKey, 0))
	// From any address: who has lost its own must be able to ask. This way round, what
	// is too short to hold the MAC address is dropped.
	b.rule(c, "its own MAC in DHCP", request, whole(), own, pass)
	b.rule(c, "no other in DHCP", request, drop)
	b.rule(c, "who asks whether an address is free", arp, payload(expr.PayloadBaseNetworkHeader, arpSenderIP, make([]byte, 4)), pass)
	for _, one := range []struct {
		where    string
		protocol []expr.Any
		offset   uint32
	}{{"", v4, sourceOffset}, {" in ARP", arp, arpSenderIP}} {
		address := load(device, expr.PayloadBaseNetworkHeader, one.offset, 4)
		b.rule(c, "its address"+one.where, one.protocol, address, lookup(s.addresses), pass)
		b.rule(c, "allowed"+one.where, one.protocol, address, lookup(s.allowed), pass)
		b.rule(c, "not known yet"+one.where, one.protocol, unheld(device, s), pass)
		b.rule(c, "count"+one.where, one.protocol, address, count(s.refused))
		b.rule(c, "no other address"+one.where, one.protocol, drop)
	}
	b.rule(c, "IPv6", etherType(unix.ETH_P_IPV6), jump(identity6))
	return c
}

// identity6 does so for IPv6, where a guest makes its addresses itself: from its MAC
// address, or they are allowed to it.
func (b *batch) identity6(device expr.MetaKey, s sets) *nftables.Chain {
	neighbour, c := b.plainChain("neighbour"), b.plainChain("identity6")
	drop, pass := verdict(expr.VerdictDrop), verdict(expr.VerdictReturn)
	source6 := func(len uint32) []expr.Any { return load(device, expr.PayloadBaseNetworkHeader, sourceOffset6, len) }
	target := load(device, expr.PayloadBaseTransportHeader, 8, 16)
	b.rule(neighbour, "made from its MAC", target, lastHalf(), lookup(s.suffixes), pass)
	b.rule(neighbour, "allowed", target, lookup(s.allowed6), pass)
	b.rule(neighbour, "not known yet", unheld(device, s), pass)
	b.rule(neighbour, "count", target, count(s.refused6))
	b.rule(neighbour, "no other address", drop)

	nobody := payload(expr.PayloadBaseNetworkHeader, sourceOffset6, make([]byte, 16))
	b.rule(c, "what it says that it has", icmp6(neighbourAdvertisement), jump(neighbour))
	b.rule(c, "what it wants to have", nobody, icmp6(neighbourSolicitation), jump(neighbour))
	b.rule(c, "who has no address yet", nobody, pass)
	b.rule(c, "made from its MAC", source6(16), lastHalf(), lookup(s.suffixes), pass)
	b.rule(c, "allowed", source6(16), lookup(s.allowed6), pass)
	b.rule(c, "not known yet", unheld(device, s), pass)
	b.rule(c, "count", source6(16), count(s.refused6))
	b.rule(c, "no other address", drop)
	return c
}

// acknowledgement matches what gives a client an address: a DHCPACK. The kernel
// can't look for an option, so this wants the message's type to be the first one,
// where our server and ISC's, Kea, dnsmasq and systemd have it.
func acknowledgement() []expr.Any {
	at := expr.PayloadBaseTransportHeader
	return slices.Concat(
		etherType(unix.ETH_P_IP), port(unix.IPPROTO_UDP, 68), udpFrom(67), whole(),
		payload(at, dhcpKind, []byte{2, 1, 6}), option(0, 53, 5),
		[]expr.Any{ // an answer to DHCPINFORM gives none
			&expr.Payload{DestRegister: 1, Base: at, Offset: dhcpYour, Len: 4},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		})
}

// lease makes the chain that writes down what a DHCPACK gives: until the lease ends,
// or somewhat longer. A guest whose client is slow, or whose server is away for a
// while, goes on.
func (b *batch) lease(device expr.MetaKey, s sets) *nftables.Chain {
	c := b.plainChain("lease")
	given := load(device, expr.PayloadBaseTransportHeader, dhcpYour, 4)
	b.rule(c, "it is known", []expr.Any{&expr.Meta{Key: device, Register: 1}}, change(s.unheld, deleteKey, 0))
	// What is there would keep the time that it had at first, by which look tells which
	// of two is newer.
	b.rule(c, "anew", given, change(s.addresses, deleteKey, 0))
	// After the type our server, ISC's and dnsmasq have their own address (6 bytes),
	// and then the time.
	const code, value = dhcpOptions + 3 + 6, dhcpOptions + 3 + 6 + 2
	at, day := expr.PayloadBaseTransportHeader, 24*time.Hour
	keep := func(text string, time time.Duration, when ...expr.Any) {
		b.rule(c, text, when, given, change(s.addresses, unix.NFT_DYNSET_OP_UPDATE, time), verdict(expr.VerdictReturn))
	}
	upTo := func(text string, time time.Duration) {
		keep(text, time, append(payload(at, code, []byte{51, 4}),
			&expr.Payload{DestRegister: 1, Base: at, Offset: value, Len: 4},
			&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: binaryutil.BigEndian.PutUint32(uint32(time.Seconds()))})...)
	}
	upTo("two hours", 2*time.Hour)
	upTo("a day", day)
	upTo("a week", 7*day)
	keep("for ever", 365*day, payload(at, code, []byte{51, 4})...) // who has it so does not renew it
	keep("nobody knows how long", 7*day)
	return c
}

func jump(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}

// card matches frames by their device and a MAC address in them.
func card(device expr.MetaKey, base expr.PayloadBase, offset uint32, s *nftables.Set, not bool) []expr.Any {
	return append(load(device, base, offset, 6), &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: not})
}

// load makes a key of the device and a part of the packet.
func load(device expr.MetaKey, base expr.PayloadBase, offset, length uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: device, Register: 1},
		&expr.Payload{DestRegister: 2, Base: base, Offset: offset, Len: length},
	}
}

// lastHalf takes the prefix from a key's IPv6 address.
func lastHalf() []expr.Any {
	return []expr.Any{&expr.Bitwise{
		SourceRegister: 2, DestRegister: 2, Len: 16,
		Mask: append(make([]byte, 8), bytes.Repeat([]byte{0xff}, 8)...), Xor: make([]byte, 16),
	}}
}

// lookup matches a key that a set has.
func lookup(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

// change does something about a key.
func change(s *nftables.Set, operation uint32, timeout time.Duration, with ...expr.Any) []expr.Any {
	return []expr.Any{&expr.Dynset{SrcRegKey: 1, SetName: s.Name, SetID: s.ID, Operation: operation, Timeout: timeout, Exprs: with}}
}

const deleteKey = 2 // NFT_DYNSET_OP_DELETE, which package unix does not have

// count counts packets by their key. What follows must be another rule: where the
// set is full, this one ends here.
func count(s *nftables.Set) []expr.Any {
	return change(s, unix.NFT_DYNSET_OP_UPDATE, refusedTime, &expr.Counter{})
}

// unheld matches devices of which it is not known yet what DHCP has given them.
func unheld(device expr.MetaKey, s sets) []expr.Any {
	return append([]expr.Any{&expr.Meta{Key: device, Register: 1}}, lookup(s.unheld)...)
}

// option matches one of a DHCP message's options, of one byte, by where it is.
func option(at uint32, code, value byte) []expr.Any {
	return payload(expr.PayloadBaseTransportHeader, dhcpOptions+at, []byte{code, 1, value})
}

func icmp6(kind byte) []expr.Any {
	return append(l4proto(unix.IPPROTO_ICMPV6), payload(expr.PayloadBaseTransportHeader, 0, []byte{kind})...)
}
