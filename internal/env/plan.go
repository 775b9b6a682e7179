package env

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"

	"ingot/api/types"
)

// freeSubnet finds a subnet like one that is wanted, which nobody has, nor overlaps
// with others that are to be avoided.
type freeSubnet func(want netip.Prefix, avoid ...netip.Prefix) (netip.Prefix, error)

// resolve decides what the declaration leaves open. What an environment that is
// there already (was) has decided stays; else free finds subnets. What can't be changed while the environment is there is objected to.
func (d *Declaration) resolve(name string, was *Env, free freeSubnet) (Env, error) {
	e := Env{Name: name, DHCP: d.DHCP, MicroVMs: d.MicroVMs, Resolvers: d.Resolvers}
	had := map[string]netip.Addr{}
	m := mistakes{source: d.source}
	if was != nil {
		e.Subnet, e.Uplink = was.Subnet, was.Uplink
		for _, one := range was.Machines {
			had[one.Name] = one.Address
		}
		d.fixed(&m, was)
	} else {
		var err error
		if e.Subnet = d.Subnet; !e.Subnet.IsValid() {
			e.Subnet, err = free(usualSubnet, append(d.DHCP.relayed(), d.Uplink, d.vpnSubnet())...)
		}
		if e.Uplink = d.Uplink; !e.Uplink.IsValid() && err == nil {
			e.Uplink, err = free(d.usualUplink(), append(d.DHCP.relayed(), e.Subnet, d.vpnSubnet())...)
		}
		if err != nil {
			return Env{}, err
		}
	}
	if d.VPN != nil {
		var old VPN
		if was != nil {
			old = was.VPN
		}
		var err error
		if e.VPN, err = d.resolveVPN(e, old, free); err != nil {
			return Env{}, err
		}
		if p := e.VPN.Subnet; p.Overlaps(e.Subnet) || p.Overlaps(e.Uplink) {
			m.add("vpn.subnet", "%s overlaps with subnet %s or uplink %s", p, e.Subnet, e.Uplink)
		}
	}
	for i, p := range d.DHCP.relayed() {
		if at := slices.IndexFunc(e.networks(), p.Overlaps); at >= 0 {
			m.add(fmt.Sprintf("dhcp.subnets[%d].subnet", i), "%s overlaps with %s, which the environment has", p, e.networks()[at])
		}
	}
	if d.Tailscale != nil {
		e.Tailscale = d.resolveTailscale(&m, e)
	}
	var problem *Mistake
	if len(m.all) == 0 {
		if e.Machines, e.DHCP.Ranges, problem = d.number(e.Subnet, had); problem != nil {
			m.all = append(m.all, problem)
		}
		d.checkMachinesAddresses(&m, e.Machines)
	}
	return e, m.objections().err()
}

// fixed objects to what would pull the ground from under what runs.
func (d *Declaration) fixed(m *mistakes, was *Env) {
	const how = "it is %s, and can't be changed while the environment is there: `ingot down` first"
	if d.Subnet.IsValid() && d.Subnet != was.Subnet {
		m.add("subnet", how, was.Subnet)
	}
	if d.Uplink.IsValid() && d.Uplink != was.Uplink {
		m.add("uplink", how, was.Uplink)
	}
	if d.Hub() != was.Hub().Name {
		m.add("machines", "the hub is %s: another machine can't become it", was.Hub().Name)
	}
	for i, one := range d.Machines {
		key := fmt.Sprintf("machines[%d]", i)
		at := slices.IndexFunc(was.Machines, func(m Machine) bool { return m.Name == one.Name })
		if at < 0 {
			continue
		}
		old := was.Machines[at]
		if one.Address.IsValid() && one.Address != old.Address {
			m.add(key+".address", "it is %s, and can't be changed: give the machine another name, which makes it another machine", old.Address)
		}
		if one.Hub != old.Hub || one.Host != old.Host {
			m.add(key+".roles", "they are %v, and can't be changed: give the machine another name, which makes it another machine", old.roles())
		}
	}
}

// Hub is the name of the machine that is to be the hub.
func (d *Declaration) Hub() string {
	for _, m := range d.Machines {
		if m.Hub {
			return m.Name
		}
	}
	return ""
}

// changes says in lines how an environment differs from what it was.
func changes(was *Env, e Env) []string {
	var lines []string
	say := func(format string, a ...any) { lines = append(lines, fmt.Sprintf(format, a...)) }
	if was == nil {
		was = &Env{}
		say("+ environment %s: subnet %s, uplink %s, DHCP range %s", e.Name, e.Subnet, e.Uplink, ranges(e.DHCP.Ranges))
	} else if is, before := ranges(e.DHCP.Ranges), ranges(was.DHCP.Ranges); is != before {
		say("~ DHCP range %s, was %s: a microVM with an address outside gets another one when it renews it", is, before)
	}
	lines = append(lines, dhcpChanges(was.DHCP, e.DHCP)...)
	switch {
	case e.VPN == was.VPN:
	case !was.VPN.On():
		say("+ VPN: %s", e.VPN)
	case !e.VPN.On():
		say("- VPN: its peers can't come in any more; it is kept who they are")
	default:
		say("~ VPN: %s, was %s: peers need other configurations", e.VPN, was.VPN)
	}
	switch {
	case e.Tailscale == was.Tailscale:
	case !was.Tailscale.On():
		say("+ Tailscale: %s", e.Tailscale)
	case !e.Tailscale.On():
		say("- Tailscale: the hub leaves the tailnet")
	default:
		say("~ Tailscale: %s, was %s", e.Tailscale, was.Tailscale)
	}
	if was.Name != "" && was.resolvers() != e.resolvers() || was.Name == "" && len(e.Resolvers) > 0 {
		say("~ DNS asks %s", e.resolvers())
	}
	for _, r := range e.reservations() {
		if !slices.Contains(was.reservations(), r) {
			say("~ address %s is kept for %s, which has it when it asks next", r.Address, r.Client())
		}
	}
	for _, r := range was.reservations() {
		if !slices.Contains(e.reservations(), r) {
			say("~ address %s is not kept for %s any more", r.Address, r.Client())
		}
	}
	find := func(all []Machine, name string) bool {
		return slices.ContainsFunc(all, func(m Machine) bool { return m.Name == name })
	}
	for _, m := range e.Machines {
		if !find(was.Machines, m.Name) {
			say("+ machine %s: %s, %v", m.Name, m.Address, m.roles())
		}
	}
	for _, m := range was.Machines {
		if !find(e.Machines, m.Name) {
			say("- machine %s, with all that is on it", m.Name)
		}
	}
	return lines
}

// placed is a microVM where it is.
type placed struct {
	host string
	vm   *types.MicroVM
}

func (p placed) name() string { return p.vm.GetSpec().GetNamespace() + "/" + p.vm.GetSpec().GetId() }

// replacement is a microVM that is not as it is declared.
type replacement struct {
	old placed
	by  MicroVM
	why string
}

// vmPlan is what is to be done so that the microVMs of the file are there, and no
// others that an earlier file had.
type vmPlan struct {
	create  []MicroVM
	replace []replacement
	remove  []placed
	theirs  []placed // made by hand under a name that the file declares
}

func planMicroVMs(wanted []MicroVM, have []placed) vmPlan {
	var p vmPlan
	for _, m := range wanted {
		i := slices.IndexFunc(have, func(h placed) bool { return h.name() == m.String() })
		if i < 0 {
			p.create = append(p.create, m)
			continue
		}
		print, ours := have[i].vm.GetSpec().GetLabels()[declared]
		switch {
		case !ours:
			p.theirs = append(p.theirs, have[i])
		case print != m.print():
			p.replace = append(p.replace, replacement{have[i], m, "it is declared otherwise than it was made"})
		case m.Host != "" && m.Host != have[i].host:
			p.replace = append(p.replace, replacement{have[i], m, "it is on " + have[i].host})
		}
	}
	for _, h := range have {
		_, ours := h.vm.GetSpec().GetLabels()[declared]
		if ours && !slices.ContainsFunc(wanted, func(m MicroVM) bool { return m.String() == h.name() }) {
			p.remove = append(p.remove, h)
		}
	}
	return p
}

func (p vmPlan) lines() []string {
	var lines []string
	say := func(format string, a ...any) { lines = append(lines, fmt.Sprintf(format, a...)) }
	for _, h := range p.remove {
		say("- microVM %s on %s, which the file no longer declares", h.name(), h.host)
	}
	for _, r := range p.replace {
		say("~ microVM %s: %s; made anew on %s, with an empty disk", r.by, r.why, cmp.Or(r.by.Host, "the host with most room"))
	}
	for _, m := range p.create {
		say("+ microVM %s on %s", m, cmp.Or(m.Host, "the host with most room"))
	}
	return lines
}

// objections are the reasons not to begin; force takes away those that are only
// about what would be lost.
func (p vmPlan) objections(force bool) Objections {
	var o Objections
	for _, h := range p.theirs {
		o = append(o, refuse(errdefs.ErrAlreadyExists,
			"microVM %s: it is there already, on %s, and not from a file: `ingot rm` it, or declare another name", h.name(), h.host))
	}
	for _, r := range p.replace {
		if !force {
			o = append(o, refuse(errdefs.ErrFailedPrecondition,
				"microVM %s: %s: it would be made anew, and lose its disk: `ingot up --force` does that", r.by, r.why))
		}
	}
	return o
}
