package dhcp

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
)

// Options are what clients of a subnet are told beside their address.
type Options struct {
	Routers []netip.Addr
	DNS     []netip.Addr
	Domain  string
	NTP     []netip.Addr
	MTU     uint16
	// Routes are classless static routes (RFC 3442). A client that understands
	// them must not look at Routers, so the default route is added to them.
	Routes []Route
	// More is any other option by its number, as it stands in the message.
	More map[uint8][]byte
}

// Route is a way to a network.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// Or is o, and what only others say: each option is as the first says it that has it.
func (o Options) Or(others Options) Options {
	o.Domain, o.MTU = cmp.Or(o.Domain, others.Domain), cmp.Or(o.MTU, others.MTU)
	for _, x := range []struct{ own, other *[]netip.Addr }{{&o.Routers, &others.Routers}, {&o.DNS, &others.DNS}, {&o.NTP, &others.NTP}} {
		if len(*x.own) == 0 {
			*x.own = *x.other
		}
	}
	if len(o.Routes) == 0 {
		o.Routes = others.Routes
	}
	more := maps.Clone(others.More)
	if more == nil {
		more = map[uint8][]byte{}
	}
	maps.Copy(more, o.More)
	if o.More = more; len(more) == 0 {
		o.More = nil
	}
	return o
}

// Size is how many bytes of a message they are. What can't be sent is none.
func (o Options) Size() (n int) {
	all, err := o.encode()
	if err != nil {
		return 0
	}
	for _, x := range all {
		n += 2*max(1, (len(x.value)+254)/255) + len(x.value)
	}
	return n
}

// same says whether two say the same of an option.
func (o Options) same(x Options, code uint8) bool {
	switch code {
	case optionRouter:
		return slices.Equal(o.Routers, x.Routers)
	case optionDNS:
		return slices.Equal(o.DNS, x.DNS)
	case optionNTP:
		return slices.Equal(o.NTP, x.NTP)
	case optionDomain:
		return o.Domain == x.Domain
	case optionMTU:
		return o.MTU == x.MTU
	case optionRoutes:
		return slices.Equal(o.Routes, x.Routes)
	}
	return bytes.Equal(o.More[code], x.More[code])
}

// option is one option as it is sent.
type option struct {
	code  byte
	value []byte
}

// ours are options that the server itself decides about, in every message.
var ours = []byte{
	optionPad, optionMask, optionRequested, optionLeaseTime, optionOverload, optionKind, optionServer, optionParameters,
	optionMaxSize, optionRenew, optionRebind, optionClientID, optionAgent, optionEnd,
}

// encode checks the options and writes them, by number.
func (o Options) encode() ([]option, error) {
	var all []option
	add := func(code byte, value []byte) {
		if len(value) > 0 {
			all = append(all, option{code, value})
		}
	}
	for code, addrs := range map[byte][]netip.Addr{optionRouter: o.Routers, optionDNS: o.DNS, optionNTP: o.NTP} {
		var value []byte
		for _, a := range addrs {
			if !a.Is4() {
				return nil, fmt.Errorf("option %d: %s is not an IPv4 address: %w", code, a, errdefs.ErrInvalidArgument)
			}
			value = append(value, a.AsSlice()...)
		}
		add(code, value)
	}
	add(optionDomain, []byte(o.Domain))
	if o.MTU != 0 {
		if o.MTU < 68 {
			return nil, fmt.Errorf("option mtu: %d is less than IPv4's smallest, 68: %w", o.MTU, errdefs.ErrInvalidArgument)
		}
		add(optionMTU, binary.BigEndian.AppendUint16(nil, o.MTU))
	}
	routes, err := o.routes()
	if err != nil {
		return nil, err
	}
	add(optionRoutes, routes)
	for code, value := range o.More {
		taken := slices.ContainsFunc(all, func(x option) bool { return x.code == code })
		if slices.Contains(ours, code) || taken {
			return nil, fmt.Errorf("option %d: it has a field of its own, or is the server's: %w", code, errdefs.ErrInvalidArgument)
		}
		all = append(all, option{code, value})
	}
	slices.SortFunc(all, func(a, b option) int { return cmp.Compare(a.code, b.code) })
	return all, nil
}

// routes is option 121: each route as its prefix's length, as many bytes of the
// network as that needs, and the router.
func (o Options) routes() ([]byte, error) {
	routes := o.Routes
	if len(routes) == 0 {
		return nil, nil
	}
	if len(o.Routers) > 0 && !slices.ContainsFunc(routes, func(r Route) bool { return r.To.Bits() == 0 }) {
		routes = append(slices.Clip(routes), Route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), o.Routers[0]})
	}
	var b []byte
	for _, r := range routes {
		if !r.To.Addr().Is4() || r.To.Bits() < 0 || !r.Via.Is4() {
			return nil, fmt.Errorf("route %s via %s: it is not of IPv4: %w", r.To, r.Via, errdefs.ErrInvalidArgument)
		}
		b = append(b, byte(r.To.Bits()))
		b = append(b, r.To.Masked().Addr().AsSlice()[:(r.To.Bits()+7)/8]...)
		b = append(b, r.Via.AsSlice()...)
	}
	return b, nil
}
