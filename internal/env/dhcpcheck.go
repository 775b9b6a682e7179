package env

import (
	"fmt"
	"net/netip"
	"slices"

	"ingot/internal/dhcp"
	"ingot/internal/hub"
)

// given is a network that DHCP gives addresses of, and where the file says so.
type given struct {
	key    string
	prefix netip.Prefix // zero: it is wrong, which has been said, or not decided yet
	*hub.Network
}

// given are the segment and the networks behind relays.
func (d *Declaration) given() []given {
	all := []given{{"dhcp", d.Subnet, &d.DHCP.Network}}
	for i := range d.DHCP.Subnets {
		all = append(all, given{fmt.Sprintf("dhcp.subnets[%d]", i), d.DHCP.Subnets[i].Prefix, &d.DHCP.Subnets[i].Network})
	}
	return all
}

// relayed are the networks behind relays.
func (d DHCP) relayed() []netip.Prefix {
	var all []netip.Prefix
	for _, s := range d.Subnets {
		all = append(all, s.Prefix)
	}
	return all
}

// checkDHCP finds what is wrong with each network, whoever has an address in it.
func (d *Declaration) checkDHCP(m *mistakes) {
	d.checkRelayed(m)
	for _, g := range d.given() {
		d.checkRanges(m, g)
		d.checkExcluded(m, g)
		for i, a := range g.Routers {
			if a.IsValid() {
				d.checkIn(m, fmt.Sprintf("%s.routers[%d]", g.key, i), g, a)
			}
		}
		d.checkLeases(m, g)
		d.checkRoutes(m, g)
		d.checkOptions(m, g)
	}
}

// checkRelayed holds networks behind relays apart from each other and from all else.
func (d *Declaration) checkRelayed(m *mistakes) {
	for i := range d.DHCP.Subnets {
		p, key := &d.DHCP.Subnets[i].Prefix, fmt.Sprintf("dhcp.subnets[%d]", i)
		other, overlaps := d.overlapping(i)
		switch {
		case !d.has(key + ".subnet"):
			m.add(key, "it has no subnet")
			continue
		case !p.IsValid(): // that has been said
			continue
		case p.Bits() < 8 || p.Bits() > 30:
			m.add(key+".subnet", "%s has no useful size: from /8 to /30", p)
		case !forMachines(*p):
			m.add(key+".subnet", "%s is not for machines", p)
		case overlaps:
			m.add(key+".subnet", "%s overlaps with %s", p, other)
		default:
			continue
		}
		*p = netip.Prefix{}
	}
}

// overlapping is what a network behind a relay overlaps with, of all that the file says.
func (d *Declaration) overlapping(i int) (string, bool) {
	p := d.DHCP.Subnets[i].Prefix
	for _, x := range []struct {
		what string
		p    netip.Prefix
	}{{"subnet", d.Subnet}, {"uplink", d.Uplink}, {"the VPN's", d.vpnSubnet()}} {
		if x.p.IsValid() && p.IsValid() && x.p.Overlaps(p) {
			return fmt.Sprintf("%s %s", x.what, x.p), true
		}
	}
	for j, s := range d.DHCP.Subnets[:i] {
		if s.Prefix.IsValid() && p.IsValid() && s.Prefix.Overlaps(p) {
			return fmt.Sprintf("%s in line %d", s.Prefix, d.lines[fmt.Sprintf("dhcp.subnets[%d].subnet", j)]), true
		}
	}
	return "", false
}

// checkIn says whether somebody can have an address in a network.
func (d *Declaration) checkIn(m *mistakes, key string, g given, a netip.Addr) bool {
	switch p := g.prefix; {
	case g.key == "dhcp" && !d.has("subnet"):
		m.add(key, "an address needs a subnet: say which")
	case !p.IsValid():
		// That has been said.
	case !p.Contains(a):
		m.add(key, "%s is not in subnet %s", a, p)
	case a == p.Addr() || a == broadcast(p):
		m.add(key, "%s is the first or the last address of %s: nobody can have it", a, p)
	default:
		return true
	}
	return false
}

// rangeKey is where a range of a network stands.
func (d *Declaration) rangeKey(g given, i int) string {
	if d.has(g.key + ".ranges") {
		return fmt.Sprintf("%s.ranges[%d]", g.key, i)
	}
	return g.key
}

// checkRanges leaves none if one is wrong.
func (d *Declaration) checkRanges(m *mistakes, g given) {
	usable, total := true, uint64(0)
	for i, r := range g.Ranges {
		key := d.rangeKey(g, i)
		if !d.has(key+".first") || !d.has(key+".last") {
			m.add(key, "it needs both first and last")
		}
		good := r.Valid()
		for i, a := range []netip.Addr{r.First, r.Last} {
			good = (!a.IsValid() || d.checkIn(m, key+[]string{".first", ".last"}[i], g, a)) && good
		}
		if good && r.Last.Less(r.First) {
			m.add(key, "%s is after %s", r.First, r.Last)
			good = false
		}
		if usable = usable && good; !good {
			continue
		}
		total += r.Size()
		at := slices.IndexFunc(g.Ranges[:i], func(x hub.Range) bool {
			return x.Valid() && !x.Last.Less(r.First) && !r.Last.Less(x.First)
		})
		if at >= 0 {
			m.add(key, "%s overlaps with %s in line %d", r, g.Ranges[at], d.lines[d.rangeKey(g, at)])
			usable = false
		}
	}
	if total > maxRange {
		m.add(g.key, "it has %d addresses, and %d are the most", total, maxRange)
		usable = false
	}
	if !usable {
		g.Ranges = nil
	}
}

func (d *Declaration) checkExcluded(m *mistakes, g given) {
	for i, x := range g.Exclude {
		key := fmt.Sprintf("%s.exclude[%d]", g.key, i)
		switch p := g.prefix; {
		case g.key == "dhcp" && !d.has("subnet"):
			m.add(key, "an address needs a subnet: say which")
		case p.IsValid() && x.IsValid() && (!p.Contains(x.Addr()) || x.Bits() < p.Bits()):
			m.add(key, "%s is not in subnet %s", x, p)
		}
	}
}

// checkLeases holds a network's lease times to each other, with those that it has of the
// segment's and as usual.
func (d *Declaration) checkLeases(m *mistakes, g given) {
	if !d.has(g.key + ".lease") {
		return
	}
	l := g.Lease.Or(d.DHCP.Lease).Or(hub.UsualLease())
	if l.Default < l.Min {
		m.add(g.key+".lease", "default, %s, is less than min, %s", brief(l.Default), brief(l.Min))
	}
	if l.Default > l.Max {
		m.add(g.key+".lease", "default, %s, is more than max, %s", brief(l.Default), brief(l.Max))
	}
}

func (d *Declaration) checkRoutes(m *mistakes, g given) {
	seen := map[netip.Prefix]string{}
	for i, r := range g.Routes {
		key := fmt.Sprintf("%s.routes[%d]", g.key, i)
		if !d.has(key + ".to") {
			m.add(key, "it has no to: which network is it to?")
		}
		if first := seen[r.To]; first != "" && r.To.IsValid() {
			m.add(key+".to", "%s is there already in line %d", r.To, d.lines[first+".to"])
		}
		seen[r.To] = key
		switch {
		case !d.has(key + ".via"):
			m.add(key, "it has no via: which router leads there?")
		case r.Via.IsValid() && !r.Via.IsUnspecified(): // 0.0.0.0: no router is needed (RFC 3442)
			d.checkIn(m, key+".via", g, r.Via)
		}
	}
}

// ownKeys are the options that are said by a key of their own.
var ownKeys = map[uint8]string{3: "routers", 6: "dns", 15: "domain", 26: "mtu", 42: "ntp", 121: "routes"}

// mostOptions is for how many bytes of options each client has room. One may take no more
// than 312 (RFC 2131, section 2), of which the server needs some to say the lease, and
// what it says if nobody else does.
const mostOptions = 190

func (d *Declaration) checkOptions(m *mistakes, g given) {
	seen := map[uint8]string{}
	good := true
	for i, o := range g.Options {
		key := fmt.Sprintf("%s.options[%d]", g.key, i)
		_, err := dhcp.ParseOption(o.Code, o.Type, o.Value)
		good = good && err == nil
		switch own := ownKeys[o.Code]; {
		case !d.has(key + ".code"):
			m.add(key, "it has no code")
		case !d.has(key + ".value"):
			m.add(key, "it has no value")
		case o.Code == 0 || len(o.Value) == 0: // that has been said
		case own != "":
			m.add(key+".code", "%d is said by %s", o.Code, own)
		case seen[o.Code] != "":
			m.add(key+".code", "%d is there already in line %d", o.Code, d.lines[seen[o.Code]+".code"])
		case err != nil:
			m.add(key, "option %d: %v", o.Code, parts(err)[0])
		}
		seen[o.Code] = key
	}
	if n := g.Bytes(); good && n > mostOptions {
		m.add(g.key, "its options have %d bytes, and every client has room for %d", n, mostOptions)
	}
}

// keptAddress is an address that is kept for somebody.
type keptAddress struct {
	key string // what holds it
	hub.Reservation
}

// keptAddresses are all that the file says, also by its microVMs.
func (d *Declaration) keptAddresses() []keptAddress {
	var all []keptAddress
	for i, r := range d.DHCP.Reservations {
		all = append(all, keptAddress{fmt.Sprintf("dhcp.reservations[%d]", i), r})
	}
	for i, one := range d.MicroVMs {
		if a, err := netip.ParseAddr(one.Address); err == nil { // else there is none, or that has been said
			all = append(all, keptAddress{fmt.Sprintf("microvms[%d]", i), hub.Reservation{MicroVM: one.String(), Address: a}})
		}
	}
	return all
}

// checkReserved holds the addresses that are kept for somebody to what they can have.
func (d *Declaration) checkReserved(m *mistakes) {
	for i := range d.DHCP.Reservations {
		key, n := fmt.Sprintf("dhcp.reservations[%d]", i), 0
		for _, who := range []string{".mac", ".client_id", ".microvm"} {
			if d.has(key + who) {
				n++
			}
		}
		if n != 1 {
			m.add(key, "it needs one of mac, client_id and microvm")
		}
		if !d.has(key + ".address") {
			m.add(key, "it has no address")
		}
	}
	addresses, clients := map[netip.Addr]string{}, map[string]string{}
	for _, k := range d.keptAddresses() {
		if !k.Address.IsValid() {
			continue
		}
		g := d.place(k)
		d.checkIn(m, k.key+".address", g, k.Address)
		if i := slices.IndexFunc(g.Exclude, func(p netip.Prefix) bool { return p.Contains(k.Address) }); i >= 0 {
			m.add(k.key+".address", "%s is excluded in line %d", k.Address, d.lines[fmt.Sprintf("%s.exclude[%d]", g.key, i)])
		}
		if slices.Contains(g.Routers, k.Address) {
			m.add(k.key+".address", "%s is a router's", k.Address)
		}
		if first := addresses[k.Address]; first != "" {
			m.add(k.key+".address", "%s is there already in line %d", k.Address, d.lines[first+".address"])
		}
		addresses[k.Address] = k.key
		client := g.key + " " + k.Client()
		if first := clients[client]; first != "" && k.Client() != "" {
			m.add(k.key, "%s has an address already in line %d", k.Client(), d.lines[first+".address"])
		}
		clients[client] = k.key
	}
}

// place is the network that an address is kept in: for a microVM, whatever the address
// is, the segment.
func (d *Declaration) place(k keptAddress) given {
	all := d.given()
	for _, g := range all[1:] {
		if g.prefix.IsValid() && g.prefix.Contains(k.Address) && k.MicroVM == "" {
			return g
		}
	}
	return all[0]
}

// checkMachinesAddresses objects to addresses for others that machines have.
func (d *Declaration) checkMachinesAddresses(m *mistakes, machines []Machine) {
	for _, k := range d.keptAddresses() {
		for _, machine := range machines {
			if k.Address.IsValid() && machine.Address == k.Address {
				m.add(k.key+".address", "%s is %s's", k.Address, machine.Name)
			}
		}
	}
}
