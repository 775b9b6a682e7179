package nat

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// batch replaces one table in one transaction.
type batch struct {
	conn  *nftables.Conn
	table *nftables.Table
	err   error
}

func begin(family nftables.TableFamily, name string) (*batch, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Family: family, Name: name}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	return &batch{conn: c, table: c.AddTable(t)}, nil
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

func (b *batch) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy *nftables.ChainPolicy) *nftables.Chain {
	if policy == nil {
		accept := nftables.ChainPolicyAccept
		policy = &accept
	}
	return b.conn.AddChain(&nftables.Chain{
		Table: b.table, Name: name, Type: kind, Hooknum: hook, Priority: priority, Policy: policy,
	})
}

func (b *batch) plainChain(name string) *nftables.Chain {
	return b.conn.AddChain(&nftables.Chain{Table: b.table, Name: name})
}

// addresses makes a named set of IPv4 addresses.
func (b *batch) addresses(name string, addrs []netip.Addr) *nftables.Set {
	set := &nftables.Set{Table: b.table, Name: name, KeyType: nftables.TypeIPAddr}
	var elements []nftables.SetElement
	for _, a := range slices.Compact(slices.SortedFunc(slices.Values(addrs), netip.Addr.Compare)) {
		elements = append(elements, nftables.SetElement{Key: a.AsSlice()})
	}
	if err := b.conn.AddSet(set, elements); err != nil && b.err == nil {
		b.err = err
	}
	return set
}

// rule adds a rule of the given parts; a text becomes its comment, by which Check
// finds it again.
func (b *batch) rule(c *nftables.Chain, text string, parts ...[]expr.Any) {
	r := &nftables.Rule{Table: b.table, Chain: c, Exprs: slices.Concat(parts...)}
	if text != "" {
		r.UserData = userdata.AppendString(nil, userdata.TypeComment, text)
	}
	b.conn.AddRule(r)
}

func verdict(kind expr.VerdictKind) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind}}
}

// iif matches the interface that a packet came in by; a trailing * matches all
// names that begin so.
func iif(name string) []expr.Any { return device(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }

func oif(name string) []expr.Any { return device(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }

func oifNot(name string) []expr.Any { return device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name) }

func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data, wild := strings.CutSuffix(name, "*")
	bytes := []byte(data)
	if !wild {
		bytes = make([]byte, unix.IFNAMSIZ)
		copy(bytes, name)
	}
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: bytes}}
}

func established() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
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

func bridgeIPv4() []expr.Any { return etherType(unix.ETH_P_IP) }

// etherSourceNot matches frames that another card than mac has sent.
func etherSourceNot(mac net.HardwareAddr) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mac},
	}
}

const (
	sourceOffset      = 12 // of an IPv4 header, RFC 791
	destinationOffset = 16
)

func source(p netip.Prefix) []expr.Any { return inPrefix(sourceOffset, p) }

func destination(p netip.Prefix) []expr.Any { return inPrefix(destinationOffset, p) }

func inPrefix(offset uint32, p netip.Prefix) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func sourceNotIn(s *nftables.Set) []expr.Any { return notIn(sourceOffset, s) }

func destinationNotIn(s *nftables.Set) []expr.Any { return notIn(destinationOffset, s) }

func notIn(offset uint32, s *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: true},
	}
}

func l4proto(p byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}},
	}
}

// port4 matches the destination port of a protocol.
func port4(proto byte, port uint16) []expr.Any {
	return append(l4proto(proto), payload(expr.PayloadBaseTransportHeader, 2, binaryutil.BigEndian.PutUint16(port))...)
}

func sport(port uint16) []expr.Any {
	return payload(expr.PayloadBaseTransportHeader, 0, binaryutil.BigEndian.PutUint16(port))
}

func sport6(port uint16) []expr.Any {
	return append(l4proto(unix.IPPROTO_UDP), sport(port)...)
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
