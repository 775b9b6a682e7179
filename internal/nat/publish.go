package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Port is a port of the hub's that leads to one of a microVM's.
type Port struct {
	Protocol string     // tcp or udp
	Address  netip.Addr // the hub's; zero: any that is not on the segment
	Port     uint16
	To       uint16
}

// ParsePort reads [ADDRESS:]PORT:TO[/tcp|/udp].
func ParsePort(text string) (Port, error) {
	rest, protocol := cutProtocol(text)
	outside, to := "", rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		outside, to = rest[:i], rest[i+1:]
	}
	p, err := parseOutside(outside, protocol)
	if err == nil {
		p.To, err = parseNumber(to)
	}
	if err != nil {
		return Port{}, fmt.Errorf("port %q: %w: it must be [ADDRESS:]PORT:TO[/tcp|/udp], like 8080:80", text, err)
	}
	return p, nil
}

// ParseOutside reads the hub's side of a port, [ADDRESS:]PORT[/tcp|/udp].
func ParseOutside(text string) (Port, error) {
	p, err := parseOutside(cutProtocol(text))
	if err != nil {
		return Port{}, fmt.Errorf("port %q: %w: it must be [ADDRESS:]PORT[/tcp|/udp], like 8080", text, err)
	}
	return p, nil
}

func cutProtocol(text string) (rest, protocol string) {
	rest, protocol, found := strings.Cut(text, "/")
	if !found {
		protocol = "tcp"
	}
	return rest, protocol
}

func parseOutside(text, protocol string) (p Port, err error) {
	if protocolNumber(protocol) == 0 {
		return p, fmt.Errorf("%q is neither tcp nor udp", protocol)
	}
	p.Protocol = protocol
	address, number, found := strings.Cut(text, ":")
	if !found {
		number = address
	} else if p.Address, err = netip.ParseAddr(address); err != nil || !p.Address.Is4() {
		return p, fmt.Errorf("%q is no IPv4 address", address)
	}
	if p.Address.IsUnspecified() {
		p.Address = netip.Addr{}
	}
	p.Port, err = parseNumber(number)
	return p, err
}

// Check says what is wrong with a port that nothing was parsed from.
func (p Port) Check() error {
	switch {
	case protocolNumber(p.Protocol) == 0:
		return fmt.Errorf("%q is neither tcp nor udp", p.Protocol)
	case p.Address.IsValid() && (!p.Address.Is4() || p.Address.IsUnspecified()):
		return fmt.Errorf("%s is no IPv4 address of the hub's", p.Address)
	case p.Port == 0:
		return errors.New("there is no port 0")
	}
	return nil
}

// parseNumber reads a port's number.
func parseNumber(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port", text)
	}
	return uint16(n), nil
}

// String is what ParsePort reads.
func (p Port) String() string { return fmt.Sprintf("%s:%d/%s", p.Outside(), p.To, p.Protocol) }

// MarshalText writes String.
func (p Port) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePort does.
func (p *Port) UnmarshalText(b []byte) (err error) {
	*p, err = ParsePort(string(b))
	return err
}

// Outside is the hub's side of it: [ADDRESS:]PORT.
func (p Port) Outside() string {
	if p.Address.IsValid() {
		return netip.AddrPortFrom(p.Address, p.Port).String()
	}
	return strconv.Itoa(int(p.Port))
}

// Collides says whether two want the same of the hub: a port of any address is one of
// each.
func (p Port) Collides(q Port) bool {
	return p.Protocol == q.Protocol && p.Port == q.Port && (p.Address == q.Address || !p.Address.IsValid() || !q.Address.IsValid())
}

func protocolNumber(name string) byte {
	switch name {
	case "tcp":
		return unix.IPPROTO_TCP
	case "udp":
		return unix.IPPROTO_UDP
	}
	return 0
}

// Published is a port that leads to an address on the segment.
type Published struct {
	Port
	Guest netip.Addr
}

func (p Published) to() netip.AddrPort { return netip.AddrPortFrom(p.Guest, p.To) }

const portRule = "ipv4 nat PREROUTING 0"

// aboutGuest says whether a rule's text is that of one microVM's: of a published port, or
// of what it may open.
func aboutGuest(text string) bool {
	return strings.HasPrefix(text, portRule) || strings.HasPrefix(text, egressRule)
}

// rule says it in the form of iptables.
func (p Published) rule() string {
	to := ""
	if p.Address.IsValid() {
		to = " -d " + p.Address.String()
	}
	return fmt.Sprintf("%s%s -p %s --dport %d -j DNAT --to-destination %s", portRule, to, p.Protocol, p.Port.Port, p.to())
}

// publish adds what passes on to microVMs what comes to a port of the hub's, from
// wherever it comes. A port is an element of a map.
func (h Hub) publish(b *batch, platform *nftables.Set) {
	anywhere := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	somewhere := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	target := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	var all, some []entry
	for _, p := range h.Published {
		key := append([]byte{protocolNumber(p.Protocol), 0, 0, 0}, register(p.Port.Port)...)
		value := append(p.Guest.AsSlice(), register(p.To)...)
		if p.Address.IsValid() {
			some = append(some, entry{key: append(p.Address.AsSlice(), key...), value: value, text: p.rule()})
		} else {
			all = append(all, entry{key: key, value: value, text: p.rule()})
		}
	}
	ports := b.mapOf(&nftables.Set{Name: "ports", IsMap: true, Concatenation: true, KeyType: anywhere, DataType: target}, all)
	addressed := b.mapOf(&nftables.Set{Name: "addressed-ports", IsMap: true, Concatenation: true, KeyType: somewhere, DataType: target}, some)
	// Of its own addresses those on the segment are the hub's services'. What the hub
	// itself asks for by 127.0.0.1 could not be answered.
	own := [][]expr.Any{toThisMachine(), destinationNotIn(platform), destinationOutside(netip.MustParsePrefix("127.0.0.0/8"))}
	for _, c := range []*nftables.Chain{
		b.chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept),
		b.chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept),
	} {
		b.rule(c, "ports of an address", passOnBy(addressed, true))
		b.rule(c, "ports of each address outside", append(own, passOnBy(ports, false))...)
	}
}

// register is a number as it stands in a register of its own.
func register(n uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, n), 0, 0) }

// The kernel's registers of 4 bytes (NFT_REG32_00 …), which a concatenation fills one
// after another.
const (
	word0 = 8 + iota
	word1
)

// passOnBy sends a packet where a map says, by its protocol and port, and its
// destination address before them if wanted. Other protocols than the map's have no
// element, whatever stands where they have no port.
func passOnBy(m *nftables.Set, address bool) []expr.Any {
	var parts []expr.Any
	at := uint32(word0)
	if address {
		parts = append(parts, &expr.Payload{DestRegister: at, Base: expr.PayloadBaseNetworkHeader, Offset: destinationOffset, Len: 4})
		at++
	}
	return append(parts,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: at},
		&expr.Payload{DestRegister: at + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: word0, DestRegister: word0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: word0, RegProtoMin: word1},
	)
}

// passedOn matches what is of a connection that goes elsewhere than its client thinks.
func passedOn() []expr.Any {
	const statusDNAT = 1 << 5 // IPS_DST_NAT
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(statusDNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// asAsked gives a packet the source address that its connection was opened to. Who
// answers sends to that, which is by way of the hub, and no machine's address on the
// segment, to which a host lets guests send next to nothing.
func asAsked() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDST, Register: 1}, // of the original direction
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

// Cut ends the connections that came by a port to a microVM's address. Without it
// those of UDP, whose clients don't notice, would go on to where they did.
func Cut(gone []Published) error {
	var problems []error
	for _, p := range gone {
		if err := link.CutConnections(protocolNumber(p.Protocol), p.Address, p.Port.Port, p.to()); err != nil {
			problems = append(problems, fmt.Errorf("cut the connections of port %s: %w", p.Port, err))
		}
	}
	return errors.Join(problems...)
}
