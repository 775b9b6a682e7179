package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// How long others may keep what is said of the environment's names, in seconds: they
// change at any time.
const localTTL = 5

// zone is the environment's own names.
type zone struct {
	Config
	domain []byte // as in a message
	server []byte
	serial uint32
}

func newZone(c Config) zone {
	z := zone{Config: c, serial: uint32(time.Now().Unix())}
	if c.Lookup != nil {
		z.domain = wireName(c.Domain)
		z.server = wireName(strings.TrimPrefix(c.Server+"."+c.Domain, "."))
	}
	return z
}

// wireName is a name as in a message.
func wireName(name string) []byte {
	var b []byte
	for label := range strings.SplitSeq(strings.ToLower(name), ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}

// answer answers names of the environment, NAME.DOMAIN and NAME alone, and the addresses
// that are its own. ok is false if the question is about something else.
func (z *zone) answer(q *question) (a answer, ok bool) {
	if z.domain == nil || q.class() != classIN {
		return a, false
	}
	text, kind := q.text(), q.kind()
	if ip, ok := reversed(text); ok {
		return z.reverse(q, ip)
	}
	if bytes.Equal(q.name(), z.domain) {
		switch kind {
		case typeSOA, typeANY:
			return z.found(typeSOA, z.soa()), true
		case typeNS:
			return z.found(typeNS, z.server), true
		}
		return z.nothing(success, z.domain), true
	}
	name, ours := strings.CutSuffix(text, "."+strings.ToLower(z.Domain))
	if !ours && !q.isShort() {
		return a, false
	}
	switch ip, there := z.Lookup(name); {
	case !there && !ours:
		return a, false
	case !there:
		return z.nothing(nameError, z.domain), true
	case ip.Is4() && (kind == typeA || kind == typeANY):
		v4 := ip.As4()
		return z.found(typeA, v4[:]), true
	case !ours:
		return answer{flags: flagAuthoritative}, true // of no zone that could be named
	}
	return z.nothing(success, z.domain), true
}

// reverse answers what an address is called. An address of the environment's that has no
// name is nobody else's to name.
func (z *zone) reverse(q *question, ip netip.Addr) (a answer, ok bool) {
	if !slices.ContainsFunc(z.Reverse, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return a, false
	}
	apex := q.name()[1+q.name()[0]:] // of the network of 256 addresses
	name, there := z.NameOf(ip)
	switch kind := q.kind(); {
	case !there:
		return z.nothing(nameError, apex), true
	case kind == typePTR || kind == typeANY:
		return z.found(typePTR, wireName(name+"."+z.Domain)), true
	}
	return z.nothing(success, apex), true
}

// reversed is the address that a name like 2.10.168.192.in-addr.arpa asks for.
func reversed(name string) (netip.Addr, bool) {
	name, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	parts := strings.Split(name, ".")
	slices.Reverse(parts)
	ip, err := netip.ParseAddr(strings.Join(parts, "."))
	return ip, err == nil && ip.Is4()
}

// asked is a pointer to the name in the question.
var asked = []byte{0xc0, headerSize}

// found is an answer with one record of the name.
func (z *zone) found(kind uint16, data []byte) answer {
	return answer{flags: flagAuthoritative, count: [6]byte{1: 1}, body: record(nil, asked, kind, data)}
}

// nothing is an answer without a record, which others may remember as long as one.
func (z *zone) nothing(code uint16, apex []byte) answer {
	return answer{flags: flagAuthoritative | code, count: [6]byte{3: 1}, body: record(nil, apex, typeSOA, z.soa())}
}

func record(b, name []byte, kind uint16, data []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint16(append(b, name...), kind)
	b = be.AppendUint32(be.AppendUint16(b, classIN), localTTL)
	return append(be.AppendUint16(b, uint16(len(data))), data...)
}

// soa is the data of the zone's record: nobody copies it, so only the last number matters.
func (z *zone) soa() []byte {
	b := append(slices.Clone(z.server), "\x0ahostmaster"...)
	b = append(b, z.domain...)
	for _, v := range []uint32{z.serial, 3600, 600, 86400, localTTL} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}
