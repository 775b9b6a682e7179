package dhcp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Conf is what a dhcpd.conf(5) says, as far as this server can do it.
type Conf struct {
	Authoritative                    bool
	DefaultLease, MaxLease, MinLease time.Duration // 0: not said
	Subnets                          []Subnet
	Reservations                     []Reservation
	// Ignored is what has no counterpart here, each with its line.
	Ignored []string
}

// ReadConf reads isc-dhcp-server's configuration, to take its place.
func ReadConf(path string) (Conf, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Conf{}, fmt.Errorf("read dhcpd.conf: %w", err)
	}
	c, err := ParseConf(string(text))
	if err != nil {
		return Conf{}, fmt.Errorf("read %s: %w", path, err)
	}
	return c, nil
}

// ParseConf reads the text of a dhcpd.conf. An error means that it is no such
// text; what dhcpd can do and this server can't is in Ignored.
func ParseConf(text string) (Conf, error) {
	p := confParser{tokens: tokens{rest: text}, text: text}
	statements, err := p.block(0)
	if err != nil {
		return Conf{}, err
	}
	r := confReader{named: map[string]optionType{}}
	// Options' names are declared anywhere, and once for all.
	r.declare(statements)
	r.read(statements, &scope{})
	return r.Conf, nil
}

// statement is `words;` or `words { body }`.
type statement struct {
	line  int
	words []confWord
	block bool
	body  []statement
}

type confWord struct {
	text   string
	quoted bool
}

func (s statement) String() string {
	var b strings.Builder
	for i, w := range s.words {
		if i > 0 && w.text != "," {
			b.WriteByte(' ')
		}
		if w.quoted {
			b.Write(appendQuoted(nil, w.text))
		} else {
			b.WriteString(w.text)
		}
	}
	if s.block {
		b.WriteString(" { … }")
	}
	return b.String()
}

// is says whether a statement begins with these words.
func (s statement) is(words ...string) bool {
	if len(s.words) < len(words) {
		return false
	}
	for i, w := range words {
		if s.words[i].quoted || !strings.EqualFold(s.words[i].text, w) {
			return false
		}
	}
	return true
}

// word is a statement's word, or nothing.
func (s statement) word(i int) string {
	if i >= len(s.words) {
		return ""
	}
	return s.words[i].text
}

// values are what commas part, from a word on.
func (s statement) values(from int) [][]confWord {
	var all [][]confWord
	var one []confWord
	for _, w := range s.words[min(from, len(s.words)):] {
		if w.text == "," && !w.quoted {
			all, one = append(all, one), nil
			continue
		}
		one = append(one, w)
	}
	return append(all, one)
}

type confParser struct {
	tokens
	text    string
	counted int // bytes of it
	lines   int // in those
}

// deepest keeps a text of braces from using up the stack.
const deepest = 64

// line is where the parser is.
func (p *confParser) line() int {
	at := len(p.text) - len(p.rest)
	p.lines += strings.Count(p.text[p.counted:at], "\n")
	p.counted = at
	return 1 + p.lines
}

// block reads statements up to the closing brace, or the end of the text.
func (p *confParser) block(depth int) (all []statement, err error) {
	if depth > deepest {
		return nil, fmt.Errorf("line %d: blocks are more than %d deep: %w", p.line(), deepest, errdefs.ErrInvalidArgument)
	}
	var s statement
	for {
		word := p.next()
		if len(s.words) == 0 {
			s.line = p.line()
		}
		switch {
		case p.quoted:
			s.words = append(s.words, confWord{word, true})
		case word == "" && depth > 0:
			return nil, fmt.Errorf("line %d: a block is not closed: %w", p.line(), errdefs.ErrInvalidArgument)
		case word == "" && len(s.words) > 0:
			return nil, fmt.Errorf("line %d: no semicolon after %q: %w", s.line, s, errdefs.ErrInvalidArgument)
		case word == "":
			return all, nil
		case word == "{":
			s.block = true
			if s.body, err = p.block(depth + 1); err != nil {
				return nil, err
			}
			all, s = append(all, s), statement{}
		case word == "}" && (depth == 0 || len(s.words) > 0):
			return nil, fmt.Errorf("line %d: a brace too many, or no semicolon before it: %w", p.line(), errdefs.ErrInvalidArgument)
		case word == "}":
			return all, nil
		case word == ";":
			if len(s.words) > 0 {
				all = append(all, s)
			}
			s = statement{}
		default:
			s.words = append(s.words, confWord{text: word})
		}
	}
}

// scope is what a block inherits and adds to.
type scope struct {
	options Options
	times   [3]time.Duration // default, max, min
	subnet  *Subnet
	inside  bool // of a block
}

// inner is a scope inside of this one. What it changes is its own.
func (s *scope) inner() *scope {
	in := *s
	in.inside = true
	in.options.More = map[uint8][]byte{}
	for code, value := range s.options.More {
		in.options.More[code] = value
	}
	return &in
}

type confReader struct {
	Conf
	named map[string]optionType // by `option NAME code …`
}

func (r *confReader) ignore(s statement, why string) {
	if why != "" {
		why = " (" + why + ")"
	}
	r.Ignored = append(r.Ignored, fmt.Sprintf("line %d: %s%s", s.line, s, why))
}

// declare takes the declarations of options, in all blocks.
func (r *confReader) declare(all []statement) {
	for _, s := range all {
		r.declare(s.body)
		if s.block || !s.is("option") || len(s.words) < 6 || s.words[2].text != "code" || s.words[4].text != "=" {
			continue
		}
		code, err := strconv.ParseUint(s.words[3].text, 10, 8)
		if err == nil {
			r.named[strings.ToLower(s.words[1].text)] = optionType{byte(code), typeOf(s.words[5:])}
		}
	}
}

// typeOf is the type of a declared option.
func typeOf(words []confWord) string {
	var name []string
	for _, w := range words {
		if w.text != "signed" && w.text != "unsigned" {
			name = append(name, w.text)
		}
	}
	text, array := strings.CutPrefix(strings.Join(name, " "), "array of ")
	kind := map[string]string{
		"ip-address": "ip", "text": "text", "string": "data", "boolean": "bool", "integer 8": "1", "integer 16": "2", "integer 32": "4",
	}[text]
	if kind != "" && array {
		kind += "*"
	}
	return kind
}

// read takes statements. First what the scope says, then its blocks: dhcpd has
// no order among them.
func (r *confReader) read(all []statement, in *scope) {
	for _, s := range all {
		if !s.block {
			r.parameter(s, in)
		}
	}
	if !in.inside {
		r.DefaultLease, r.MaxLease, r.MinLease = in.times[0], in.times[1], in.times[2]
	}
	for _, s := range all {
		if s.block {
			r.declaration(s, in)
		}
	}
}

func (r *confReader) declaration(s statement, in *scope) {
	switch {
	case s.is("subnet") && s.word(2) == "netmask" && in.subnet == nil:
		r.subnet(s, in)
	case s.is("pool") && in.subnet != nil:
		r.pool(s, in)
	case s.is("group") || s.is("shared-network"):
		r.read(s.body, in.inner())
	case s.is("host"):
		r.host(s)
	default:
		r.ignore(s, "")
	}
}

func (r *confReader) subnet(s statement, in *scope) {
	ip, err := netip.ParseAddr(s.word(1))
	mask, err2 := netip.ParseAddr(s.word(3))
	if err != nil || err2 != nil || !ip.Is4() || !mask.Is4() {
		r.ignore(s, "it is no IPv4 subnet")
		return
	}
	ones, bits := net.IPMask(mask.AsSlice()).Size()
	if bits == 0 || netip.PrefixFrom(ip, ones).Masked().Addr() != ip {
		r.ignore(s, "the address and the mask do not fit")
		return
	}
	inner := in.inner()
	inner.subnet = &Subnet{Prefix: netip.PrefixFrom(ip, ones)}
	r.read(s.body, inner)
	n := inner.subnet
	n.Options = inner.options
	if len(n.Options.More) == 0 {
		n.Options.More = nil
	}
	for i, at := range []*time.Duration{&n.DefaultLease, &n.MaxLease, &n.MinLease} {
		if said := [3]time.Duration{r.DefaultLease, r.MaxLease, r.MinLease}[i]; inner.times[i] != said {
			*at = inner.times[i]
		}
	}
	r.Subnets = append(r.Subnets, *n)
}

// pool has ranges of its own; what else it says would be for them alone.
func (r *confReader) pool(s statement, in *scope) {
	for _, x := range s.body {
		if x.is("range") && !x.block {
			r.parameter(x, in)
		} else {
			r.ignore(x, "in a pool")
		}
	}
}

func (r *confReader) parameter(s statement, in *scope) {
	time := func(i int) {
		n, err := strconv.ParseUint(s.word(1), 10, 32)
		if err != nil || n == 0 {
			r.ignore(s, "it is no time in seconds")
			return
		}
		in.times[i] = secondsOf(n)
	}
	switch {
	case s.is("default-lease-time"):
		time(0)
	case s.is("max-lease-time"):
		time(1)
	case s.is("min-lease-time"):
		time(2)
	case s.is("authoritative"):
		r.Authoritative = true
	case s.is("not", "authoritative"):
		r.Authoritative = false
	case s.is("range") && in.subnet != nil:
		r.addresses(s, in)
	case s.is("option") && s.word(2) == "code":
		if r.named[strings.ToLower(s.word(1))].kind == "" {
			r.ignore(s, "its type is not known")
		}
	case s.is("option"):
		r.option(s, in)
	case s.is("ddns-update-style", "none"), s.is("log-facility"):
	default:
		r.ignore(s, "")
	}
}

func secondsOf(n uint64) time.Duration { return time.Duration(n) * time.Second }

// addresses is `range [dynamic-bootp] FIRST [LAST];`.
func (r *confReader) addresses(s statement, in *scope) {
	words := s.words[1:]
	if len(words) > 0 && words[0].text == "dynamic-bootp" {
		words = words[1:]
	}
	if len(words) != 1 && len(words) != 2 {
		r.ignore(s, "")
		return
	}
	first, err := netip.ParseAddr(words[0].text)
	last, err2 := netip.ParseAddr(words[len(words)-1].text)
	if err != nil || err2 != nil || !in.subnet.Prefix.Contains(first) || !in.subnet.Prefix.Contains(last) || last.Less(first) {
		r.ignore(s, "it is no range of the subnet")
		return
	}
	in.subnet.Ranges = append(in.subnet.Ranges, Range{first, last})
}

func (r *confReader) host(s statement) {
	var h Reservation
	var addrs []netip.Addr
	for _, x := range s.body {
		switch {
		case x.is("hardware", "ethernet"):
			mac, err := net.ParseMAC(x.word(2))
			if err != nil || len(mac) != 6 {
				r.ignore(x, "it is no MAC address")
				continue
			}
			h.MAC = mac
		case x.is("option", "dhcp-client-identifier"), x.is("host-identifier", "option", "dhcp-client-identifier"):
			id, err := encodeValue("data", x.values(len(x.words)-1))
			if err != nil || len(x.words) > 4 || len(id) == 0 {
				r.ignore(x, "")
				continue
			}
			h.ClientID = id
		case x.is("host-identifier", "option", "host-name") && len(x.words) == 4:
			h.Name = x.word(3)
		case x.is("fixed-address"):
			for _, v := range x.values(1) {
				ip, err := addressOf(v)
				if err != nil {
					r.ignore(x, err.Error())
					continue
				}
				addrs = append(addrs, ip)
			}
		default:
			r.ignore(x, "of a host")
		}
	}
	if len(addrs) == 0 || h.MAC == nil && h.ClientID == nil && h.Name == "" {
		r.ignore(s, "it has no address, or no client")
		return
	}
	for _, ip := range addrs {
		h.IP = ip
		r.Reservations = append(r.Reservations, h)
	}
}

func addressOf(words []confWord) (netip.Addr, error) {
	if len(words) != 1 || words[0].quoted {
		return netip.Addr{}, fmt.Errorf("it is no IPv4 address: %w", errdefs.ErrInvalidArgument)
	}
	ip, err := netip.ParseAddr(words[0].text)
	if err != nil || from(ip) == 0 {
		return netip.Addr{}, fmt.Errorf("%q is no IPv4 address: %w", words[0].text, errdefs.ErrInvalidArgument)
	}
	return ip, nil
}

// option is `option NAME VALUE, …;`.
func (r *confReader) option(s statement, in *scope) {
	name := strings.ToLower(s.word(1))
	kind, ok := r.named[name]
	if !ok {
		kind, ok = optionTypes[name]
	}
	if !ok || kind.kind == "" {
		r.ignore(s, "the option is not known")
		return
	}
	if kind.code == optionMask {
		return // the subnet says it
	}
	value, err := encodeValue(kind.kind, s.values(2))
	if err == nil {
		err = in.options.set(kind.code, value)
	}
	if err != nil {
		r.ignore(s, err.Error())
	}
}

// set gives an option, as it is sent, to its field.
func (o *Options) set(code byte, value []byte) error {
	switch code {
	case optionRouter, optionDNS, optionNTP:
		var addrs []netip.Addr
		for part := range slices.Chunk(value, 4) {
			ip, ok := netip.AddrFromSlice(part)
			if !ok {
				return fmt.Errorf("it is no list of addresses: %w", errdefs.ErrInvalidArgument)
			}
			addrs = append(addrs, ip)
		}
		*map[byte]*[]netip.Addr{optionRouter: &o.Routers, optionDNS: &o.DNS, optionNTP: &o.NTP}[code] = addrs
	case optionDomain:
		o.Domain = string(value)
	case optionMTU:
		if len(value) != 2 || binary.BigEndian.Uint16(value) < 68 {
			return fmt.Errorf("it is no MTU: %w", errdefs.ErrInvalidArgument)
		}
		o.MTU = binary.BigEndian.Uint16(value)
	case optionRoutes:
		routes, err := parseRoutes(value)
		if err != nil {
			return err
		}
		o.Routes = routes
	default:
		if slices.Contains(ours, code) {
			return fmt.Errorf("the server decides about option %d: %w", code, errdefs.ErrInvalidArgument)
		}
		if o.More == nil {
			o.More = map[uint8][]byte{}
		}
		o.More[code] = value
	}
	return nil
}

// parseRoutes reads option 121.
func parseRoutes(b []byte) ([]Route, error) {
	var all []Route
	for len(b) > 0 {
		bits := int(b[0])
		n := (bits + 7) / 8
		if bits > 32 || len(b) < 1+n+4 {
			return nil, fmt.Errorf("it is no list of routes: %w", errdefs.ErrInvalidArgument)
		}
		var ip [4]byte
		copy(ip[:], b[1:1+n])
		all = append(all, Route{netip.PrefixFrom(netip.AddrFrom4(ip), bits).Masked(), netip.AddrFrom4([4]byte(b[1+n:]))})
		b = b[1+n+4:]
	}
	return all, nil
}
