package main

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// The message types (RFC 2132, option 53) that a client knows.
const (
	discover = 1
	offer    = 2
	request  = 3
	ack      = 5
	nak      = 6
)

// The options that it knows.
const (
	optNetmask    = 1
	optRouter     = 3
	optDNS        = 6
	optHostname   = 12
	optDomain     = 15
	optMTU        = 26
	optRequested  = 50
	optTime       = 51
	optType       = 53
	optServer     = 54
	optParameters = 55
	optMaxSize    = 57
	optRenew      = 58
	optRebind     = 59
	optRoutes     = 121 // RFC 3442
	optEnd        = 255
)

const (
	bootpSize = 236 // without the magic cookie and the options
	cookie    = 0x63825363
)

// message is what a client sends.
type message struct {
	kind      byte
	xid       uint32
	mac       string
	hostname  string
	current   netip.Addr // of a lease to be renewed
	requested netip.Addr
	server    netip.Addr
}

func (m message) marshal() []byte {
	b := make([]byte, bootpSize, 400)
	b[0], b[1], b[2] = 1, 1, 6 // a request, on Ethernet
	binary.BigEndian.PutUint32(b[4:], m.xid)
	if m.current.IsValid() {
		copy(b[12:], m.current.AsSlice())
	}
	copy(b[28:], hardware(m.mac))
	b = binary.BigEndian.AppendUint32(b, cookie)
	b = append(b, optType, 1, m.kind)
	b = append(b, optMaxSize, 2, 1500>>8, 1500&0xff)
	if m.requested.IsValid() {
		b = append(append(b, optRequested, 4), m.requested.AsSlice()...)
	}
	if m.server.IsValid() {
		b = append(append(b, optServer, 4), m.server.AsSlice()...)
	}
	if m.hostname != "" {
		name := m.hostname[:min(len(m.hostname), 63)]
		b = append(append(b, optHostname, byte(len(name))), name...)
	}
	// Routes are asked for before the router, in whose place they are (RFC 3442).
	b = append(b, optParameters, 9, optNetmask, optRoutes, optRouter, optDNS, optDomain, optMTU, optTime, optRenew, optRebind, optEnd)
	return append(b, make([]byte, max(0, 300-len(b)))...) // old relays drop less than BOOTP's size
}

func hardware(mac string) []byte {
	var b []byte
	for part := range strings.SplitSeq(mac, ":") {
		n, err := strconv.ParseUint(part, 16, 8)
		if err != nil {
			return nil
		}
		b = append(b, byte(n))
	}
	return b
}

// parseReply reads a server's answer to m. It reports false for anything else.
func parseReply(b []byte, m message) (l lease, kind byte, ok bool) {
	if len(b) < bootpSize+4 || b[0] != 2 ||
		binary.BigEndian.Uint32(b[4:]) != m.xid ||
		string(b[28:34]) != string(hardware(m.mac)) ||
		binary.BigEndian.Uint32(b[bootpSize:]) != cookie {
		return lease{}, 0, false
	}
	address := netip.AddrFrom4([4]byte(b[16:20]))
	prefix := 0
	var ways []byte
	for o := b[bootpSize+4:]; len(o) > 0 && o[0] != optEnd; {
		if o[0] == 0 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || len(o) < 2+int(o[1]) {
			return lease{}, 0, false
		}
		value := o[2 : 2+int(o[1])]
		switch {
		case o[0] == optType && len(value) == 1:
			kind = value[0]
		case o[0] == optNetmask && len(value) == 4:
			prefix = bits.LeadingZeros32(^binary.BigEndian.Uint32(value))
		case o[0] == optRoutes:
			ways = append(ways, value...) // a long option comes in parts (RFC 3396)
		default:
			l.set(o[0], value)
		}
		o = o[2+int(o[1]):]
	}
	if kind == nak {
		return lease{}, kind, true
	}
	if !address.IsValid() || address.IsUnspecified() || prefix == 0 {
		return lease{}, 0, false
	}
	l.address = netip.PrefixFrom(address, prefix)
	if l.routes = parseRoutes(ways); len(l.routes) == 0 && l.router.IsValid() {
		l.routes = []route{{netip.PrefixFrom(netip.IPv4Unspecified(), 0), l.router}}
	}
	if l.time > 0 {
		if l.renew <= 0 || l.renew >= l.time {
			l.renew = l.time / 2
		}
		if l.rebind <= l.renew || l.rebind >= l.time {
			l.rebind = max(l.time/8*7, l.renew)
		}
	}
	return l, kind, true
}

func (l *lease) set(option byte, value []byte) {
	switch option {
	case optServer:
		l.server = firstAddr(value)
	case optRouter:
		l.router = firstAddr(value)
	case optDNS:
		for ; len(value) >= 4; value = value[4:] {
			l.dns = append(l.dns, firstAddr(value))
		}
	case optDomain:
		l.domain = domain(value)
	case optMTU:
		if len(value) == 2 {
			if mtu := int(binary.BigEndian.Uint16(value)); mtu >= 576 {
				l.mtu = mtu
			}
		}
	case optTime:
		l.time = seconds(value)
	case optRenew:
		l.renew = seconds(value)
	case optRebind:
		l.rebind = seconds(value)
	}
}

// parseRoutes reads classless routes: a prefix's length, as many bytes of it as that needs,
// and a router. Of what is not well formed there are none.
func parseRoutes(b []byte) (all []route) {
	for len(b) > 0 {
		bits := int(b[0])
		n := (bits + 7) / 8
		if bits > 32 || len(b) < 1+n+4 {
			return nil
		}
		var to [4]byte
		copy(to[:], b[1:])
		clear(to[n:])
		all = append(all, route{netip.PrefixFrom(netip.AddrFrom4(to), bits).Masked(), firstAddr(b[1+n:])})
		b = b[1+n+4:]
	}
	return all
}

func firstAddr(b []byte) netip.Addr {
	if len(b) < 4 {
		return netip.Addr{}
	}
	return netip.AddrFrom4([4]byte(b))
}

// domain is written to resolv.conf, so nothing but a name's letters passes.
func domain(b []byte) string {
	s := strings.TrimRight(string(b), "\x00")
	bad := func(r rune) bool {
		return r != '.' && r != '-' && r != '_' && (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z')
	}
	if strings.ContainsFunc(s, bad) {
		return ""
	}
	return s
}

// seconds reads a time; all ones is for ever.
func seconds(b []byte) time.Duration {
	if len(b) != 4 {
		return 0
	}
	n := binary.BigEndian.Uint32(b)
	if n == 0xffffffff {
		return 0
	}
	return max(time.Duration(n), 1) * time.Second
}
