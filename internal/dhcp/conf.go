package dhcp

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Dhcpd is what a configuration of isc-dhcp-server asks for, as far as a server of
// ours does the same.
type Dhcpd struct {
	Authoritative                    bool
	DefaultLease, MaxLease, MinLease time.Duration // dhcpd's own, if it does not say
	Subnets                          []Subnet
	Reservations                     []Reservation
	Left                             []Left

	said  map[saidOption]confStatement
	timed map[netip.Prefix][]confStatement // what says the lease times of a subnet
}

// saidOption is an option of a subnet.
type saidOption struct {
	subnet netip.Prefix
	code   uint8
}

// Left is a line that is not carried over, and why.
type Left struct {
	Line int
	Text string // the line's statement
	Why  string
}

func (l Left) String() string { return fmt.Sprintf("line %d: %s: %s", l.Line, l.Text, l.Why) }

// ParseDhcpd reads a dhcpd.conf. What is not understood is left, and said so; an error
// says that the text is no configuration at all.
func ParseDhcpd(text string) (Dhcpd, error) {
	p := confParser{tokens: tokens{rest: text}, left: text, line: 1}
	all, err := p.statements(0)
	if err != nil {
		return Dhcpd{}, fmt.Errorf("read dhcpd's configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	r := confReader{Dhcpd: Dhcpd{said: map[saidOption]confStatement{}, timed: map[netip.Prefix][]confStatement{}}, types: map[string]confType{}}
	for name, t := range confTypes {
		r.types[name] = t
	}
	whole := r.scope(all, confScope{})
	r.DefaultLease, r.MaxLease, r.MinLease = whole.lifetimes()
	r.Authoritative = whole.authoritative
	for i := range r.Subnets { // what all have is not repeated
		if n := &r.Subnets[i]; n.DefaultLease == r.DefaultLease && n.MaxLease == r.MaxLease && n.MinLease == r.MinLease {
			n.DefaultLease, n.MaxLease, n.MinLease = 0, 0, 0
		}
	}
	slices.SortStableFunc(r.Left, func(a, b Left) int { return a.Line - b.Line })
	r.Left = slices.Compact(r.Left)
	return r.Dhcpd, nil
}

// With is a server's configuration that also does as dhcpd did. What c says already
// goes before, and what is not taken for that is left: each option of c's subnets, and
// their lease times, all three or none. Reservations are not part of it.
func (c Config) With(d Dhcpd) (Config, []Left) {
	left := slices.Clone(d.Left)
	timed := c.DefaultLease != 0 || c.MaxLease != 0 || c.MinLease != 0
	if !timed {
		c.DefaultLease, c.MaxLease, c.MinLease = d.DefaultLease, d.MaxLease, d.MinLease
	}
	c.Subnets = slices.Clone(c.Subnets)
	for _, n := range d.Subnets {
		if timed && n.DefaultLease == 0 {
			n.DefaultLease, n.MaxLease, n.MinLease = d.DefaultLease, d.MaxLease, d.MinLease
		}
		i := slices.IndexFunc(c.Subnets, func(own Subnet) bool { return own.Prefix.Overlaps(n.Prefix) })
		switch {
		case i < 0:
			c.Subnets = append(c.Subnets, n)
		case c.Subnets[i].Prefix.Masked() != n.Prefix:
			left = append(left, Left{n.line, "subnet " + n.Prefix.String(), "it overlaps with " + c.Subnets[i].Prefix.Masked().String()})
		default:
			var more []Left
			c.Subnets[i], more = c.Subnets[i].with(n, d, timed)
			left = append(left, more...)
		}
	}
	slices.SortStableFunc(left, func(a, b Left) int { return a.Line - b.Line })
	return c, left
}

// with is a subnet and what dhcpd has for it. timed says that there are lease times which
// go before dhcpd's.
func (n Subnet) with(old Subnet, d Dhcpd, timed bool) (Subnet, []Left) {
	own := make([]span, len(n.Ranges))
	for i, r := range n.Ranges {
		own[i] = span{from(r.First), from(r.Last)}
	}
	slices.SortFunc(own, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	n.Ranges = slices.Clone(n.Ranges)
	for _, r := range old.Ranges {
		for _, s := range without4(span{from(r.First), from(r.Last)}, own) {
			n.Ranges = append(n.Ranges, Range{s.first.netip(), s.last.netip()})
		}
	}
	n.Options = n.Options.Or(old.Options)
	var left []Left
	leave := func(s confStatement) {
		left = append(left, Left{s.line, s.String(), "in " + old.Prefix.String() + " this is the hub's to say"})
	}
	for at, s := range d.said {
		if at.subnet == old.Prefix && !n.Options.same(old.Options, at.code) {
			leave(s)
		}
	}
	timed = timed || n.DefaultLease != 0 || n.MaxLease != 0 || n.MinLease != 0
	if !timed {
		n.DefaultLease, n.MaxLease, n.MinLease = old.DefaultLease, old.MaxLease, old.MinLease
		return n, left
	}
	for _, s := range d.timed[old.Prefix] {
		leave(s)
	}
	return n, left
}

// confStatement is `word word …;` or `word … { … }`.
type confStatement struct {
	line   int
	words  []confWord
	block  []confStatement
	braces bool
}

type confWord struct {
	text   string
	quoted bool
}

func (s confStatement) String() string {
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
	return b.String()
}

// word is a word by its place, and nothing where there is none.
func (s confStatement) word(i int) string {
	if i < len(s.words) {
		return s.words[i].text
	}
	return ""
}

// is says whether a statement is just that.
func (s confStatement) is(text string) bool { return !s.braces && s.String() == text }

type confParser struct {
	tokens
	left string // of the text, when line was counted
	line int
}

// deepest is how many blocks may be in one another.
const deepest = 50

func (p *confParser) count() int {
	read := p.left[:len(p.left)-len(p.rest)]
	p.line += strings.Count(read, "\n")
	p.left = p.rest
	return p.line
}

// statements reads up to the brace that closes a block, or to the end.
func (p *confParser) statements(depth int) (all []confStatement, err error) {
	if depth > deepest {
		return nil, fmt.Errorf("line %d: more than %d blocks in one another", p.count(), deepest)
	}
	var s confStatement
	for {
		word := p.next()
		quoted := p.quoted
		line := p.count()
		if len(s.words) == 0 {
			s.line = line
		}
		switch {
		case word == "" && !quoted:
			if len(s.words) > 0 {
				return nil, fmt.Errorf("line %d: %s does not end", s.line, s)
			}
			if depth > 0 {
				return nil, fmt.Errorf("line %d: a block does not end", line)
			}
			return all, nil
		case word == "{" && !quoted:
			s.braces = true
			if s.block, err = p.statements(depth + 1); err != nil {
				return nil, err
			}
			all, s = append(all, s), confStatement{}
		case word == "}" && !quoted:
			if len(s.words) > 0 || depth == 0 {
				return nil, fmt.Errorf("line %d: a brace too many, or a semicolon missing", line)
			}
			return all, nil
		case word == ";" && !quoted:
			if len(s.words) > 0 {
				all = append(all, s)
			}
			s = confStatement{}
		default:
			s.words = append(s.words, confWord{word, quoted})
		}
	}
}

// confScope is what holds in a block: its own, and that of the blocks around it.
type confScope struct {
	kind                       string
	initial, longest, shortest time.Duration
	authoritative              bool
	options                    map[string]confStatement
	times                      []confStatement
	subnet                     *Subnet
}

// lifetimes are what dhcpd makes of what is said, and not said: 12 and 24 hours.
func (c confScope) lifetimes() (initial, longest, shortest time.Duration) {
	longest = cmp.Or(c.longest, 24*time.Hour)
	initial = min(cmp.Or(c.initial, 12*time.Hour), longest)
	return initial, longest, min(cmp.Or(c.shortest, time.Minute), initial)
}

type confReader struct {
	Dhcpd
	types map[string]confType
}

func (r *confReader) leave(s confStatement, format string, args ...any) {
	r.Left = append(r.Left, Left{s.line, s.String(), fmt.Sprintf(format, args...)})
}

// silent are statements that ask for what a server of ours does anyway.
var silent = []string{
	"ddns-update-style none", "ddns-updates off", "not authoritative", "allow unknown-clients", "allow booting", "deny bootp", "ignore bootp",
	"allow unknown clients", "deny declines",
}

// scope reads a block, whose surroundings are given: first what holds in all of it.
func (r *confReader) scope(all []confStatement, c confScope) confScope {
	options := make(map[string]confStatement, len(c.options))
	for name, s := range c.options {
		options[name] = s
	}
	c.options, c.times = options, slices.Clip(c.times)
	var blocks, own []confStatement
	for _, s := range all {
		switch first := s.word(0); {
		case s.braces:
			blocks = append(blocks, s)
		case slices.ContainsFunc(silent, s.is):
		case s.is("authoritative"):
			if c.authoritative = true; c.kind != "" {
				r.leave(s, "it holds for the whole server or not at all")
			}
		case first == "default-lease-time", first == "max-lease-time", first == "min-lease-time":
			r.duration(s, map[string]*time.Duration{"default-lease-time": &c.initial, "max-lease-time": &c.longest, "min-lease-time": &c.shortest}[first])
			c.times, own = append(c.times, s), append(own, s)
		case first == "option" && s.word(2) == "code":
			r.define(s)
		case first == "option" && len(s.words) > 2:
			c.options[s.word(1)] = s
			own = append(own, s)
		case first == "range" && c.subnet != nil:
			r.addRange(s, c.subnet)
		case first == "include":
			r.leave(s, "no other file is read: put its text here")
		default:
			r.leave(s, "there is no such setting here")
		}
	}
	before := len(r.Subnets)
	if c.kind == "subnet" {
		r.finish(c)
	}
	for _, s := range blocks {
		r.block(s, c)
	}
	if len(r.Subnets) == before && c.kind != "" {
		for _, s := range own { // of a group of hosts
			r.leave(s, "it holds for no subnet")
		}
	}
	return c
}

func (r *confReader) block(s confStatement, c confScope) {
	kind := s.word(0)
	inner := c
	inner.kind = kind
	switch {
	case kind == "subnet" && len(s.words) == 4 && s.word(2) == "netmask" && c.subnet == nil:
		p, err := maskedPrefix(s.word(1), s.word(3))
		if err != nil {
			r.leave(s, "%s", err)
			return
		}
		if i := slices.IndexFunc(r.Subnets, func(n Subnet) bool { return n.Prefix.Overlaps(p) }); i >= 0 {
			r.leave(s, "it overlaps with %s", r.Subnets[i].Prefix)
			return
		}
		inner.subnet = &Subnet{Prefix: p, line: s.line}
		r.pools(s, inner.subnet)
		r.scope(slices.DeleteFunc(slices.Clone(s.block), isPool), inner)
	case kind == "shared-network":
		if n := countSubnets(s.block); n > 1 {
			r.leave(s, "its %d subnets are taken for segments of their own, each behind a relay", n)
		}
		r.scope(s.block, inner)
	case kind == "group":
		r.scope(s.block, inner)
	case kind == "host" && len(s.words) == 2:
		r.host(s)
	default:
		r.leave(s, "there is no such setting here")
	}
}

func isPool(s confStatement) bool { return s.braces && s.word(0) == "pool" }

func countSubnets(all []confStatement) (n int) {
	for _, s := range all {
		if s.word(0) == "subnet" {
			n++
		}
	}
	return n
}

// pools takes the ranges of a subnet's pools. Who may have them is another matter.
func (r *confReader) pools(s confStatement, n *Subnet) {
	for _, p := range s.block {
		if !isPool(p) {
			continue
		}
		for _, s := range p.block {
			switch {
			case s.word(0) == "range" && !s.braces:
				r.addRange(s, n)
			case slices.ContainsFunc(silent, s.is):
			default:
				r.leave(s, "a pool has nothing of its own but ranges")
			}
		}
	}
}

func (r *confReader) addRange(s confStatement, n *Subnet) {
	words := s.words[1:]
	if s.word(1) == "dynamic-bootp" {
		r.leave(s, "its addresses are taken, but BOOTP is not spoken")
		words = words[1:]
	}
	if len(words) != 1 && len(words) != 2 {
		r.leave(s, "it is not one address or two")
		return
	}
	first, err := parse4(words[0].text)
	last, err2 := parse4(words[len(words)-1].text)
	switch {
	case err != nil || err2 != nil:
		r.leave(s, "it is not of addresses")
	case last.Less(first) || !n.Prefix.Contains(first) || !n.Prefix.Contains(last):
		r.leave(s, "it is no range in %s", n.Prefix)
	case slices.ContainsFunc(n.Ranges, func(x Range) bool { return !last.Less(x.First) && !x.Last.Less(first) }):
		r.leave(s, "it overlaps with another range")
	default:
		n.Ranges = append(n.Ranges, Range{first, last})
	}
}

// finish adds a subnet with what holds in it.
func (r *confReader) finish(c confScope) {
	n := c.subnet
	n.DefaultLease, n.MaxLease, n.MinLease = c.lifetimes()
	r.timed[n.Prefix] = c.times
	for _, name := range sortedNames(c.options) {
		r.option(c.options[name], n)
	}
	r.Subnets = append(r.Subnets, *n)
}

func (r *confReader) duration(s confStatement, d *time.Duration) {
	n, err := strconv.ParseUint(s.word(1), 10, 31)
	if err != nil || n == 0 || len(s.words) != 2 {
		r.leave(s, "it is not a number of seconds that a lease can last")
		return
	}
	*d = time.Duration(n) * time.Second
}

func (r *confReader) host(s confStatement) {
	var base Reservation
	var fixed *confStatement
	for _, in := range s.block {
		switch {
		case in.braces:
			r.leave(in, "a host has no such setting here")
		case in.word(0) == "hardware" && in.word(1) == "ethernet" && len(in.words) == 3:
			mac, err := net.ParseMAC(in.word(2))
			if err != nil || len(mac) != 6 {
				r.leave(in, "it is not a card's address")
				continue
			}
			base.MAC = mac
		case in.word(0) == "fixed-address":
			fixed = &in
		case in.word(0) == "option" && in.word(1) == "dhcp-client-identifier" && len(in.words) == 3:
			id, ok := octets(in.words[2])
			if !ok {
				r.leave(in, "it is neither a string nor bytes")
				continue
			}
			base.ClientID = id
		case in.word(0) == "host-identifier" && in.word(1) == "option" && in.word(2) == "host-name" && len(in.words) == 4:
			if base.Name = hostname([]byte(in.word(3))); base.Name == "" {
				r.leave(in, "it is no name of a host")
			}
		case in.word(0) == "set" && in.word(1) == microVMVariable && in.word(2) == "=" && len(in.words) == 4: // our own export
			base.MicroVM = in.word(3)
		case slices.ContainsFunc(silent, in.is):
		default:
			r.leave(in, "hosts have no settings of their own but their address")
		}
	}
	switch {
	case len(base.MAC) == 0 && len(base.ClientID) == 0 && base.Name == "" && base.MicroVM == "":
		r.leave(s, "it names no card and no client identifier")
	case fixed == nil:
		r.leave(s, "no address is fixed for it")
	default:
		r.fix(*fixed, base)
	}
}

// fix adds a host's addresses: one in each subnet, at most.
func (r *confReader) fix(s confStatement, base Reservation) {
	for _, w := range s.words[1:] {
		if w.text == "," {
			continue
		}
		ip, err := parse4(w.text)
		if err != nil {
			r.leave(s, "%s is not an address: names are not looked up", w.text)
			continue
		}
		base.IP = ip
		if slices.ContainsFunc(r.Reservations, func(x Reservation) bool { return x.IP == ip }) {
			r.leave(s, "another host has %s", ip)
			continue
		}
		r.Reservations = append(r.Reservations, base)
	}
}

func parse4(text string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	if err == nil && (!ip.Is4() || ip.IsUnspecified()) {
		err = fmt.Errorf("%s is not an address of IPv4", text)
	}
	return ip, err
}

func maskedPrefix(address, mask string) (netip.Prefix, error) {
	ip, err := parse4(address)
	m, err2 := netip.ParseAddr(mask)
	if err != nil || err2 != nil || !m.Is4() {
		return netip.Prefix{}, fmt.Errorf("it is no IPv4 subnet")
	}
	ones, bits := net.IPMask(m.AsSlice()).Size()
	p := netip.PrefixFrom(ip, ones)
	if bits == 0 || ones == 0 || p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("it is no IPv4 subnet")
	}
	return p, nil
}
