package nat

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// batch replaces one table in one transaction, or says what of it is in force.
type batch struct {
	conn   *nftables.Conn
	table  *nftables.Table
	chains []*nftables.Chain
	rules  map[string][]string // the comments, by chain
	sets   map[string][]entry  // nil: the kernel changes them
	err    error
}

func begin(family nftables.TableFamily, name string) (*batch, error) {
	c, err := nftables.New(nftables.WithSockOptions(roomy))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Family: family, Name: name}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	return &batch{conn: c, table: c.AddTable(t), rules: map[string][]string{}, sets: map[string][]entry{}}, nil
}

// roomy lets a socket take a whole table: it is sent as one message, and the kernel
// confirms each of its rules before the first confirmation is read. Usual sockets have
// room for some 270 of those; when it is gone, the table is in force and it is said that
// it is not. These are limits, and take no memory.
func roomy(c *netlink.Conn) error {
	const room = 32 << 20
	return errors.Join(c.SetReadBuffer(room), c.SetWriteBuffer(room))
}

func (b *batch) commit() error {
	if b.err == nil {
		b.err = b.conn.Flush()
	}
	if b.err != nil {
		return fmt.Errorf("set nftables table %s: %w", b.table.Name, b.err)
	}
	return nil
}

func (b *batch) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return b.add(&nftables.Chain{Name: name, Type: kind, Hooknum: hook, Priority: priority, Policy: &policy})
}

func (b *batch) plainChain(name string) *nftables.Chain { return b.add(&nftables.Chain{Name: name}) }

func (b *batch) add(c *nftables.Chain) *nftables.Chain {
	c.Table = b.table
	b.chains = append(b.chains, c)
	return b.conn.AddChain(c)
}

// addresses makes a named set of IPv4 addresses.
func (b *batch) addresses(name string, addrs []netip.Addr) *nftables.Set {
	var keys [][]byte
	for _, a := range addrs {
		keys = append(keys, a.AsSlice())
	}
	return b.set(&nftables.Set{Name: name, KeyType: nftables.TypeIPAddr}, keys)
}

func (b *batch) set(set *nftables.Set, keys [][]byte) *nftables.Set {
	entries := []entry{}
	for _, key := range keys {
		entries = append(entries, entry{key: key})
	}
	return b.mapOf(set, entries)
}

// entry is an element of a set, or of a map to values, or of one to chains. One with a
// text is a rule of its own.
type entry struct {
	key, value  []byte
	chain, text string
}

// whole is all of it, as check reads it.
func (e entry) whole() []byte { return slices.Concat(e.key, e.value, []byte(e.chain)) }

func (e entry) element() nftables.SetElement {
	if e.chain == "" {
		return nftables.SetElement{Key: e.key, Val: e.value}
	}
	return nftables.SetElement{Key: e.key, VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: e.chain}}
}

// The length of a netlink attribute has 16 bits. The entries of one are far fewer than
// those that it has room for.
const entriesAtOnce = 256

// mapOf makes a set of entries. Of some that are equal one is taken.
func (b *batch) mapOf(set *nftables.Set, entries []entry) *nftables.Set {
	slices.SortFunc(entries, func(x, y entry) int { return bytes.Compare(x.whole(), y.whole()) })
	// Two of one key are none that the kernel takes: one of them is better than no rules.
	entries = slices.CompactFunc(entries, func(x, y entry) bool { return bytes.Equal(x.key, y.key) })
	set.Table = b.table
	elements := make([]nftables.SetElement, len(entries))
	for i, e := range entries {
		elements[i] = e.element()
	}
	b.insert(set, append([]entry{}, entries...), elements)
	return set
}

// addSet adds a set of this table with its elements, of which some may be ranges.
func (b *batch) addSet(set *nftables.Set, elements []nftables.SetElement) {
	entries := []entry{}
	for _, e := range elements {
		entries = append(entries, entry{key: slices.Concat(e.Key, e.KeyEnd)})
	}
	if set.Dynamic {
		entries = nil
	}
	b.insert(set, entries, elements)
}

func (b *batch) insert(set *nftables.Set, entries []entry, elements []nftables.SetElement) {
	b.sets[set.Name] = entries
	err := b.conn.AddSet(set, nil)
	for chunk := range slices.Chunk(elements, entriesAtOnce) {
		err = errors.Join(err, b.conn.SetAddElements(set, chunk))
	}
	b.err = errors.Join(b.err, err)
}

// rule adds a rule of the given parts. Its text becomes its comment, by which
// check finds it again: no two of a chain have the same.
func (b *batch) rule(c *nftables.Chain, text string, parts ...[]expr.Any) {
	b.rules[c.Name] = append(b.rules[c.Name], text)
	b.conn.AddRule(&nftables.Rule{
		Table: b.table, Chain: c, Exprs: slices.Concat(parts...),
		UserData: userdata.AppendString(nil, userdata.TypeComment, text),
	})
}

func verdict(kind expr.VerdictKind) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind}}
}

// iif matches the interface that a packet came in by; a trailing * matches all
// names that begin so.
func iif(name string) []expr.Any { return device(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }

func iifNot(name string) []expr.Any { return device(expr.MetaKeyIIFNAME, expr.CmpOpNeq, name) }

func oif(name string) []expr.Any { return device(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }

func oifNot(name string) []expr.Any { return device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name) }

func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data, wild := strings.CutSuffix(name, "*")
	padded := []byte(data)
	if !wild {
		padded = ifname(name)
	}
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: padded}}
}

func ifname(name string) []byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return padded
}

func established() []expr.Any { return tracked(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED) }

// invalid packets belong to no connection: NAT passes them by, and so does what asks for a
// connection's direction.
func invalid() []expr.Any { return tracked(expr.CtStateBitINVALID) }

func tracked(states uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(states),
			Xor:  make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// ipv4 is needed in tables that see several protocols.
func ipv4() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}
}

func etherType(t uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(t)},
	}
}

// etherTo matches frames to a card.
func etherTo(mac net.HardwareAddr) []expr.Any { return payload(expr.PayloadBaseLLHeader, 0, mac) }

// etherSourceNot matches frames that another card than mac has sent.
func etherSourceNot(mac net.HardwareAddr) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mac},
	}
}

// tagged matches frames of a VLAN. The kernel takes the outer tag off before the
// bridge sees the frame, and its protocol is that of what the tag held; but it is
// shown where the frame had it.
func tagged(protocol uint16) []expr.Any {
	return payload(expr.PayloadBaseLLHeader, 12, binaryutil.BigEndian.PutUint16(protocol))
}

const (
	sourceOffset      = 12 // of an IPv4 header, RFC 791
	destinationOffset = 16
	sourceOffset6     = 8 // of an IPv6 header, RFC 8200
)

func source(p netip.Prefix) []expr.Any { return inPrefix(sourceOffset, p) }

func destination(p netip.Prefix) []expr.Any { return inPrefix(destinationOffset, p) }

func destinationOutside(p netip.Prefix) []expr.Any {
	parts := destination(p)
	parts[len(parts)-1].(*expr.Cmp).Op = expr.CmpOpNeq
	return parts
}

func inPrefix(offset uint32, p netip.Prefix) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func sourceIn(s *nftables.Set) []expr.Any { return in(sourceOffset, s, false) }

func destinationIn(s *nftables.Set) []expr.Any { return in(destinationOffset, s, false) }

func destinationNotIn(s *nftables.Set) []expr.Any { return in(destinationOffset, s, true) }

// in matches an address in a network header.
func in(offset uint32, s *nftables.Set, not bool) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: not},
	}
}

func l4proto(p byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}},
	}
}

// port matches the destination port of a protocol.
func port(proto byte, port uint16) []expr.Any {
	return append(l4proto(proto), payload(expr.PayloadBaseTransportHeader, 2, binaryutil.BigEndian.PutUint16(port))...)
}

// toThisMachine matches what is for an address of this machine's own.
func toThisMachine() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// passOn sends a packet to another address.
func passOn(to netip.Addr, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
	}
}

// udpFrom matches UDP's source port.
func udpFrom(port uint16) []expr.Any {
	return append(l4proto(unix.IPPROTO_UDP), payload(expr.PayloadBaseTransportHeader, 0, binaryutil.BigEndian.PutUint16(port))...)
}

// whole matches IPv4 packets that are no fragments. Of a fragment, what is looked
// for may be read from the frame's padding.
func whole() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x3f, 0xff}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 0}},
	}
}

// acknowledges matches TCP segments that are not a connection's first: a first
// one has no ACK flag.
func acknowledges() []expr.Any {
	const flags, ack = 13, 0x10
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
	}
}

func payload(base expr.PayloadBase, offset uint32, want []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(want))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want},
	}
}
