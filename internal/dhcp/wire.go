package dhcp

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// The messages of RFC 2132, section 9.6.
type kind byte

const (
	kindDiscover kind = iota + 1
	kindOffer
	kindRequest
	kindDecline
	kindAck
	kindNak
	kindRelease
	kindInform
)

// Options by number (RFC 2132 and the ones named beside them).
const (
	optionPad             = 0
	optionMask            = 1
	optionRouter          = 3
	optionDNS             = 6
	optionHostname        = 12
	optionDomain          = 15
	optionPolicyFilter    = 21
	optionMTU             = 26
	optionStaticRoutes    = 33
	optionNTP             = 42
	optionRequested       = 50
	optionLeaseTime       = 51
	optionOverload        = 52
	optionKind            = 53
	optionServer          = 54
	optionParameters      = 55
	optionMaxSize         = 57
	optionRenew           = 58
	optionRebind          = 59
	optionClientID        = 61
	optionAgent           = 82  // RFC 3046
	optionSubnetSelection = 118 // RFC 3011
	optionRoutes          = 121 // RFC 3442
	optionEnd             = 255
	agentLinkSelection    = 5 // RFC 3527
	agentServerIdentifier = 11
	bootRequest           = 1
	bootReply             = 2
)

const (
	headerSize = 236
	cookie     = 0x63825363
	// What every client takes: 576 bytes with IP and UDP (RFC 2131, section 2).
	smallestMax = 576 - 28
	largestMax  = 1500 - 28
	// BOOTP's size, below which some relays drop (RFC 1542, section 2.1).
	smallest      = 300
	flagBroadcast = 0x8000
)

// message is a client's message. Its slices point into the bytes that it was
// parsed from.
type message struct {
	kind           kind
	xid            uint32
	flags          uint16
	client, giaddr addr4 // ciaddr, giaddr
	mac            [6]byte

	requested, server addr4
	lease             uint32 // seconds; 0: none asked for
	maxSize           uint16
	link              addr4 // the subnet that a relay or client names (RFC 3527, RFC 3011)
	override          addr4 // the server identifier that a relay wants (RFC 5107)
	id, hostname      []byte
	parameters        []byte
	agent             []byte

	vm string // the client's, NAMESPACE/NAME, if that matters
}

// addr4 is an IPv4 address that can be counted with.
type addr4 uint32

func from(a netip.Addr) addr4 {
	if !a.Is4() {
		return 0
	}
	b := a.As4()
	return addr4(binary.BigEndian.Uint32(b[:]))
}

// netip is the address; 0.0.0.0 stands for none.
func (a addr4) netip() netip.Addr {
	if a == 0 {
		return netip.Addr{}
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(a))
	return netip.AddrFrom4(b)
}

func (a addr4) String() string { return a.netip().String() }

// MarshalText is for logs.
func (a addr4) MarshalText() ([]byte, error) { return a.netip().MarshalText() }

var (
	errShort   = errors.New("the message is too short")
	errRequest = errors.New("the message is not a DHCP request of an Ethernet card")
	errOption  = errors.New("an option goes beyond the message's end")
)

// parse reads a client's message. What it does not know it passes over.
func parse(b []byte) (m message, err error) {
	be := binary.BigEndian
	if len(b) < headerSize+4 {
		return m, errShort
	}
	if b[0] != bootRequest || b[1] != 1 || b[2] != 6 || be.Uint32(b[headerSize:]) != cookie {
		return m, errRequest
	}
	m.xid, m.flags = be.Uint32(b[4:]), be.Uint16(b[10:])
	m.client, m.giaddr = addr4(be.Uint32(b[12:])), addr4(be.Uint32(b[24:]))
	copy(m.mac[:], b[28:])
	overload, err := m.options(b[headerSize+4:])
	if err == nil && overload&1 != 0 {
		_, err = m.options(b[108:headerSize])
	}
	if err == nil && overload&2 != 0 {
		_, err = m.options(b[44:108])
	}
	return m, err
}

// options reads one field of options (RFC 2131, section 4.1).
func (m *message) options(b []byte) (overload byte, err error) {
	for len(b) > 0 {
		code := b[0]
		if code == optionEnd {
			break
		}
		if code == optionPad {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return 0, errOption
		}
		value := b[2 : 2+int(b[1])]
		b = b[2+int(b[1]):]
		if code == optionOverload && len(value) == 1 {
			overload = value[0]
		}
		m.option(code, value)
	}
	return overload, nil
}

func (m *message) option(code byte, value []byte) {
	switch code {
	case optionKind:
		if len(value) == 1 {
			m.kind = kind(value[0])
		}
	case optionRequested:
		m.requested = address(value)
	case optionServer:
		m.server = address(value)
	case optionLeaseTime:
		if len(value) == 4 {
			m.lease = binary.BigEndian.Uint32(value)
		}
	case optionMaxSize:
		if len(value) == 2 {
			m.maxSize = binary.BigEndian.Uint16(value)
		}
	case optionClientID:
		m.id = whole(m.id, value)
	case optionHostname:
		m.hostname = whole(m.hostname, value)
	case optionParameters:
		m.parameters = whole(m.parameters, value)
	case optionSubnetSelection:
		if m.link == 0 { // a relay's word goes before
			m.link = address(value)
		}
	case optionAgent:
		m.agent = whole(m.agent, value)
		m.agentOptions(value)
	}
}

// whole joins the parts of an option that is longer than 255 bytes (RFC 3396).
func whole(before, value []byte) []byte {
	if before == nil {
		return value
	}
	return append(append([]byte(nil), before...), value...)
}

func (m *message) agentOptions(b []byte) {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		value := b[2 : 2+int(b[1])]
		switch b[0] {
		case agentLinkSelection:
			m.link = address(value)
		case agentServerIdentifier:
			m.override = address(value)
		}
		b = b[2+int(b[1]):]
	}
}

func address(value []byte) addr4 {
	if len(value) != 4 {
		return 0
	}
	return addr4(binary.BigEndian.Uint32(value))
}

// answer is a reply that is being written: a header, options, and room that is
// kept for the relay's option, which comes last (RFC 3046, section 2.2).
type answer struct {
	b     []byte
	limit int
	agent []byte
}

// newAnswer begins the reply to m in b, which it overwrites.
func newAnswer(b []byte, m *message, k kind, your, server addr4) answer {
	limit := min(max(int(m.maxSize)-28, smallestMax), largestMax)
	if len(m.agent) > 0 && limit < smallestMax+2+len(m.agent) {
		limit = smallestMax + 2 + len(m.agent) // a relay takes it off again
	}
	b = append(b[:0], make([]byte, headerSize)...)
	be := binary.BigEndian
	b[0], b[1], b[2] = bootReply, 1, 6
	be.PutUint32(b[4:], m.xid)
	flags := m.flags
	if k == kindNak && m.giaddr != 0 {
		flags |= flagBroadcast // RFC 2131, section 4.3.2
	}
	be.PutUint16(b[10:], flags)
	if k == kindAck {
		be.PutUint32(b[12:], uint32(m.client))
	}
	be.PutUint32(b[16:], uint32(your))
	be.PutUint32(b[24:], uint32(m.giaddr))
	copy(b[28:], m.mac[:])
	b = be.AppendUint32(b, cookie)
	// The hosts' rules find the kind as the first option, and the lease's time as the
	// third (docs/decisions/013).
	b = append(b, optionKind, 1, byte(k))
	a := answer{b: b, limit: limit, agent: m.agent}
	a.number(optionServer, uint32(server))
	return a
}

func (a *answer) number(code byte, v uint32) {
	a.b = binary.BigEndian.AppendUint32(append(a.b, code, 4), v)
}

// option adds an option if there is room for it.
func (a *answer) option(code byte, value []byte) {
	parts := max(1, (len(value)+254)/255)
	if len(a.b)+len(value)+2*parts+2+len(a.agent)+1 > a.limit {
		return
	}
	for {
		n := min(len(value), 255)
		a.b = append(append(a.b, code, byte(n)), value[:n]...)
		if value = value[n:]; len(value) == 0 {
			return
		}
	}
}

// bytes ends the answer.
func (a *answer) bytes() []byte {
	for agent := a.agent; len(agent) > 0; {
		n := min(len(agent), 255)
		a.b = append(append(a.b, optionAgent, byte(n)), agent[:n]...)
		agent = agent[n:]
	}
	a.b = append(a.b, optionEnd)
	for len(a.b) < smallest {
		a.b = append(a.b, optionPad)
	}
	return a.b
}
