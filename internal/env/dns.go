package env

import (
	"fmt"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"

	"ingot/internal/dns"
	"ingot/internal/hub"
)

// dnsPort is where resolvers are, if nobody says otherwise.
const dnsPort = 53

// dnsFields are the keys of dns.
func (r *reader) dnsFields(d *Declaration) fields {
	return fields{"upstreams": func(n *yaml.Node, key string) {
		r.list(n, key, func(n *yaml.Node, key string) {
			text := r.text(n, key)
			at, err := netip.ParseAddrPort(text)
			if ip, bad := netip.ParseAddr(text); bad == nil {
				at, err = netip.AddrPortFrom(ip, dnsPort), nil
			}
			switch {
			case text == "":
			case err != nil || !at.Addr().Is4() || at.Port() == 0 || at.Addr().IsUnspecified():
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

// checkReserved holds the addresses that microVMs are to have to what they can have.
func (d *Declaration) checkReserved(m *mistakes) {
	seen := map[netip.Addr]string{}
	for i, one := range d.MicroVMs {
		a, err := netip.ParseAddr(one.Address)
		if err != nil {
			continue // there is none, or that has been said
		}
		key := fmt.Sprintf("microvms[%d].address", i)
		if d.checkAddress(m, key, a); seen[a] != "" {
			m.add(key, "%s is there already in line %d", a, d.lines[seen[a]])
		}
		seen[a] = key
	}
}

// checkMachinesAddresses objects to addresses of microVMs that machines have.
func (d *Declaration) checkMachinesAddresses(m *mistakes, machines []Machine) {
	for i, one := range d.MicroVMs {
		for _, machine := range machines {
			if machine.Address.String() == one.Address {
				m.add(fmt.Sprintf("microvms[%d].address", i), "%s is %s's", one.Address, machine.Name)
			}
		}
	}
}

// reservations are the addresses that microVMs are to have, as the hub wants them.
func (e Env) reservations() []hub.Reservation {
	var all []hub.Reservation
	for _, m := range e.MicroVMs {
		if a, err := netip.ParseAddr(m.Address); err == nil {
			all = append(all, hub.Reservation{MicroVM: m.String(), Address: a})
		}
	}
	return all
}
