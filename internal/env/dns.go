package env

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"ingot/internal/dns"
	"ingot/internal/hub"
)

// dnsFields are the keys of dns.
func (r *reader) dnsFields(d *Declaration) fields {
	return fields{"upstreams": func(n *yaml.Node, key string) {
		r.list(n, key, func(n *yaml.Node, key string) {
			text := r.text(n, key)
			at, err := dns.ParseUpstream(text)
			switch {
			case text == "":
			case err != nil || !at.Addr().Is4():
				r.add(key, "%q is not a resolver's IPv4 address, nor ADDRESS:PORT", text)
			case at.Addr().IsLoopback():
				r.add(key, "%s is the hub's own loopback: say where the resolver is reached from elsewhere", text)
			default:
				d.Resolvers = append(d.Resolvers, at)
			}
		})
	}}
}

// upstreams are what the hub asks: what the file says, else what this machine asks.
func (e Env) upstreams() ([]string, error) {
	if len(e.Resolvers) == 0 {
		return dns.SystemUpstreams()
	}
	var all []string
	for _, at := range e.Resolvers {
		all = append(all, at.String())
	}
	return all, nil
}

// resolvers says which those of the file are.
func (e Env) resolvers() string {
	if len(e.Resolvers) == 0 {
		return "this machine's resolvers"
	}
	return strings.Trim(fmt.Sprint(e.Resolvers), "[]")
}

// reservations are the addresses that are kept for somebody, as the hub wants them.
func (e Env) reservations() []hub.Reservation {
	all := slices.Clone(e.DHCP.Reservations)
	for _, m := range e.MicroVMs {
		if a, err := netip.ParseAddr(m.Address); err == nil {
			all = append(all, hub.Reservation{MicroVM: m.String(), Address: a})
		}
	}
	return all
}
