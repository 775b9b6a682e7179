package dhcp

import (
	"encoding/binary"
	"encoding/hex"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// confType is an option as dhcpd knows it: its number, and how its value is written.
type confType struct {
	code uint8
	form confForm
}

// confForm is how an option's value is written.
type confForm struct {
	kind   confKind
	bytes  int // of a number
	signed bool
	array  bool
}

type confKind byte

const (
	confText confKind = iota // a string, or bytes
	confAddress
	confNumber
	confFlag
	confDomains // RFC 3397, uncompressed
)

var (
	confAddresses = confForm{kind: confAddress, array: true}
	confUint8     = confForm{kind: confNumber, bytes: 1}
	confUint16    = confForm{kind: confNumber, bytes: 2}
	confUint32    = confForm{kind: confNumber, bytes: 4}
)

// confTypes are dhcpd's names (dhcp-options(5)) of the options that a client may be
// told by a server, without those of other option spaces.
var confTypes = map[string]confType{
	"subnet-mask": {optionMask, confForm{kind: confAddress}}, "time-offset": {2, confForm{kind: confNumber, bytes: 4, signed: true}}, "routers": {optionRouter, confAddresses},
	"time-servers": {4, confAddresses}, "ien116-name-servers": {5, confAddresses}, "domain-name-servers": {optionDNS, confAddresses},
	"log-servers": {7, confAddresses}, "cookie-servers": {8, confAddresses}, "lpr-servers": {9, confAddresses},
	"impress-servers": {10, confAddresses}, "resource-location-servers": {11, confAddresses}, "host-name": {optionHostname, confForm{}},
	"boot-size": {13, confUint16}, "merit-dump": {14, confForm{}}, "domain-name": {optionDomain, confForm{}}, "swap-server": {16, confForm{kind: confAddress}},
	"root-path": {17, confForm{}}, "extensions-path": {18, confForm{}}, "ip-forwarding": {19, confForm{kind: confFlag}},
	"non-local-source-routing": {20, confForm{kind: confFlag}}, "policy-filter": {optionPolicyFilter, confAddresses}, "max-dgram-reassembly": {22, confUint16},
	"default-ip-ttl": {23, confUint8}, "path-mtu-aging-timeout": {24, confUint32}, "interface-mtu": {optionMTU, confUint16},
	"all-subnets-local": {27, confForm{kind: confFlag}}, "broadcast-address": {28, confForm{kind: confAddress}},
	"perform-mask-discovery": {29, confForm{kind: confFlag}}, "mask-supplier": {30, confForm{kind: confFlag}},
	"router-discovery": {31, confForm{kind: confFlag}}, "router-solicitation-address": {32, confForm{kind: confAddress}},
	"static-routes": {optionStaticRoutes, confAddresses}, "trailer-encapsulation": {34, confForm{kind: confFlag}}, "arp-cache-timeout": {35, confUint32},
	"ieee802-3-encapsulation": {36, confForm{kind: confFlag}}, "default-tcp-ttl": {37, confUint8}, "tcp-keepalive-interval": {38, confUint32},
	"tcp-keepalive-garbage": {39, confForm{kind: confFlag}}, "nis-domain": {40, confForm{}}, "nis-servers": {41, confAddresses},
	"ntp-servers": {optionNTP, confAddresses}, "vendor-encapsulated-options": {43, confForm{}}, "netbios-name-servers": {44, confAddresses},
	"netbios-dd-server": {45, confAddresses}, "netbios-node-type": {46, confUint8}, "netbios-scope": {47, confForm{}},
	"font-servers": {48, confAddresses}, "x-display-manager": {49, confAddresses}, "nisplus-domain": {64, confForm{}},
	"nisplus-servers": {65, confAddresses}, "tftp-server-name": {66, confForm{}}, "bootfile-name": {67, confForm{}},
	"mobile-ip-home-agent": {68, confAddresses}, "smtp-server": {69, confAddresses}, "pop-server": {70, confAddresses},
	"nntp-server": {71, confAddresses}, "www-server": {72, confAddresses}, "finger-server": {73, confAddresses}, "irc-server": {74, confAddresses},
	"default-url": {114, confForm{}}, "domain-search": {119, confForm{kind: confDomains, array: true}},
}

// define takes `option NAME code NUMBER = FORM`.
func (r *confReader) define(s confStatement) {
	code, err := strconv.ParseUint(s.word(3), 10, 8)
	if err != nil || s.word(4) != "=" || len(s.words) < 6 {
		r.leave(s, "an option is defined by NAME code NUMBER = FORM")
		return
	}
	words := make([]string, len(s.words)-5)
	for i := range words {
		words[i] = s.word(5 + i)
	}
	form, ok := parseForm(words)
	if !ok {
		r.leave(s, "options of this form are not known")
		return
	}
	r.types[s.word(1)] = confType{uint8(code), form}
}

func parseForm(words []string) (f confForm, ok bool) {
	if len(words) > 2 && words[0] == "array" && words[1] == "of" {
		f, ok = parseForm(words[2:])
		f.array = true
		return f, ok && f.kind != confText
	}
	if words[0] == "signed" || words[0] == "unsigned" {
		f.signed = words[0] == "signed"
		if words = words[1:]; len(words) == 0 || words[0] != "integer" {
			return f, false
		}
	}
	switch strings.Join(words, " ") {
	case "string", "text":
	case "ip-address":
		f.kind = confAddress
	case "boolean":
		f.kind = confFlag
	case "domain-list":
		f.kind, f.array = confDomains, true
	case "integer 8", "integer 16", "integer 32":
		f.kind = confNumber
		f.bytes = map[string]int{"8": 1, "16": 2, "32": 4}[words[1]]
	default:
		return f, false
	}
	return f, true
}

// option adds `option NAME VALUE` to a subnet's.
func (r *confReader) option(s confStatement, n *Subnet) {
	o := &n.Options
	t, known := r.types[s.word(1)]
	if !known {
		r.leave(s, "no option of this name is known")
		return
	}
	if slices.Contains(ours, t.code) {
		r.leave(s, "the server itself decides about this option")
		return
	}
	value, ok := t.form.value(s.words[2:])
	if !ok || len(value) == 0 {
		r.leave(s, "it is not written as this option has to be: names are not looked up, and expressions not evaluated")
		return
	}
	r.said[saidOption{n.Prefix, t.code}] = s
	switch t.code {
	case optionRouter:
		o.Routers = addresses(value)
	case optionDNS:
		o.DNS = addresses(value)
	case optionNTP:
		o.NTP = addresses(value)
	case optionDomain:
		o.Domain = string(value)
	case optionMTU:
		if len(value) != 2 || binary.BigEndian.Uint16(value) < 68 {
			r.leave(s, "IPv4's smallest is 68")
			return
		}
		o.MTU = binary.BigEndian.Uint16(value)
	case optionRoutes:
		if o.Routes, ok = parseRoutes(value); !ok {
			r.leave(s, "these are no routes (RFC 3442)")
		}
	default:
		if o.More == nil {
			o.More = map[uint8][]byte{}
		}
		o.More[t.code] = value
	}
}

// value is what stands in the message.
func (f confForm) value(words []confWord) (b []byte, ok bool) {
	if f.kind == confText {
		if len(words) != 1 {
			return nil, false
		}
		return octets(words[0])
	}
	wanted := true
	for i, w := range words {
		switch {
		case w.text == "," && !w.quoted:
			if wanted || i == len(words)-1 {
				return nil, false
			}
			wanted = true
			continue
		case i > 0 && !f.array:
			return nil, false
		}
		// dhcpd takes numbers and pairs of addresses without a comma between them, too.
		wanted = false
		if b, ok = f.append(b, w); !ok {
			return nil, false
		}
	}
	return b, true
}

func (f confForm) append(b []byte, w confWord) ([]byte, bool) {
	switch f.kind {
	case confAddress:
		ip, err := netip.ParseAddr(w.text)
		if err != nil || !ip.Is4() {
			return nil, false
		}
		return append(b, ip.AsSlice()...), true
	case confFlag:
		i := slices.Index([]string{"false", "off", "true", "on"}, strings.ToLower(w.text))
		return append(b, byte(i/2)), i >= 0
	case confDomains:
		for label := range strings.SplitSeq(strings.TrimSuffix(w.text, "."), ".") {
			if !isLabel(label) {
				return nil, false
			}
			b = append(append(b, byte(len(label))), label...)
		}
		return append(b, 0), true
	}
	n, err := strconv.ParseInt(w.text, 0, 64)
	low, high := f.limits()
	if err != nil || n < low || n > high {
		return nil, false
	}
	return append(b, binary.BigEndian.AppendUint32(nil, uint32(n))[4-f.bytes:]...), true
}

// limits are the least and the largest number.
func (f confForm) limits() (low, high int64) {
	bits := 8 * f.bytes
	if f.signed {
		return -1 << (bits - 1), 1<<(bits-1) - 1
	}
	return 0, int64(math.MaxUint32) >> (32 - bits)
}

// octets is a string, or bytes as in 0a:00:01.
func octets(w confWord) ([]byte, bool) {
	if w.quoted {
		return []byte(w.text), true
	}
	var b []byte
	for part := range strings.SplitSeq(w.text, ":") {
		if len(part) == 1 {
			part = "0" + part
		}
		one, err := hex.DecodeString(part)
		if err != nil || len(one) != 1 {
			return nil, false
		}
		b = append(b, one[0])
	}
	return b, true
}

func addresses(b []byte) []netip.Addr {
	var all []netip.Addr
	for part := range slices.Chunk(b, 4) {
		if ip, ok := netip.AddrFromSlice(part); ok {
			all = append(all, ip)
		}
	}
	return all
}

// parseRoutes reads option 121.
func parseRoutes(b []byte) (all []Route, ok bool) {
	for len(b) > 0 {
		bits := int(b[0])
		n := (bits + 7) / 8
		if bits > 32 || len(b) < 1+n+4 {
			return nil, false
		}
		var to [4]byte
		copy(to[:], b[1:1+n])
		all = append(all, Route{netip.PrefixFrom(netip.AddrFrom4(to), bits).Masked(), netip.AddrFrom4([4]byte(b[1+n : 5+n]))})
		b = b[5+n:]
	}
	return all, true
}

func sortedNames[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
