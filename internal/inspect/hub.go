package inspect

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	v1 "ingot/api/ingot/v1"
)

// segment is the interface's name where the hub does not say another.
const segment = "bond0.1000"

func (s *survey) hubStep() step {
	h := s.hub
	facts := func() *v1.HubFacts { // only called below a check that has had them
		f, _ := h.facts()
		return f
	}
	nat := step{
		name: "NAT",
		children: []step{{
			name:  "forwarding",
			check: func(context.Context) finding { return checkForwarding(facts().GetNat()) },
		}},
		more: func() []step { return ruleSteps(facts().GetNat()) },
	}
	for _, host := range s.hosts {
		nat.children = append(nat.children, step{
			name:  "packet from " + host.Name,
			check: func(ctx context.Context) finding { return s.checkOutside(ctx, host, facts()) },
		})
	}
	more := func() (all []step) {
		if v := facts().GetVpn(); v != nil {
			all = append(all, vpnStep(v, facts().GetInterfaces()))
		}
		if t := facts().GetTailscale(); t != nil {
			all = append(all, tailscaleStep(t))
		}
		if address := facts().GetMetrics(); address != "" {
			all = append(all, metricsStep(address))
		}
		return all
	}
	return step{
		name: h.Name,
		more: more,
		check: func(context.Context) finding {
			f, err := h.facts()
			if err != nil {
				return unreachable(h.Machine, "the hub (DHCP server, DNS, NAT, registry)", err)
			}
			return pass(fmt.Sprintf("version %s, up %s, memory %s", f.GetVersion(), age(f.GetUptime().AsDuration()), bytes(f.GetRssBytes())),
				"endpoint: "+h.Endpoint, "hostname: "+f.GetHostname(), "configuration: "+f.GetConfigFile())
		},
		children: []step{
			{name: "address", check: func(context.Context) finding {
				name := cmp.Or(facts().GetDhcp().GetInterface(), segment)
				return checkAddress(facts().GetInterfaces(), name, h.Address)
			}},
			{name: "uplink", check: func(context.Context) finding {
				return checkAddress(facts().GetInterfaces(), facts().GetNat().GetOutside(), netip.Addr{})
			}},
			{name: "DHCP server", check: func(context.Context) finding { return checkDHCP(facts().GetDhcp()) },
				children: []step{
					{name: "configuration", check: func(context.Context) finding { return checkDHCPConfig(facts().GetDhcp()) }},
					{name: "leases", check: func(context.Context) finding { return s.checkLeases(facts().GetDhcp()) }},
				}},
			nat,
			{name: "DNS", check: func(context.Context) finding { return checkDNS(facts().GetDns()) }},
			{name: "microVMs", check: func(context.Context) finding { return checkHeard(facts().GetHosts()) }},
			{name: "registry", check: func(context.Context) finding { return checkRegistry(facts().GetRegistry()) }},
		},
	}
}

// checkAddress looks for an interface that is up and has an address: want, or
// any if want is the zero value.
func checkAddress(all []*v1.InterfaceFacts, name string, want netip.Addr) finding {
	i := slices.IndexFunc(all, func(f *v1.InterfaceFacts) bool { return f.GetName() == name })
	if i < 0 {
		return fail(fmt.Sprintf("there is no interface %s", name))
	}
	f := all[i]
	has := func(a string) bool {
		p, err := netip.ParsePrefix(a)
		return err == nil && (p.Addr() == want || !want.IsValid() && p.Addr().Is4())
	}
	shown := strings.Join(f.GetAddresses(), " ")
	switch {
	case !f.GetUp():
		return fail(name + " is down")
	case !slices.ContainsFunc(f.GetAddresses(), has) && want.IsValid():
		return fail(fmt.Sprintf("%s has %s, not %s", name, cmp.Or(shown, "no address"), want))
	case !slices.ContainsFunc(f.GetAddresses(), has):
		return fail(name + " has no IPv4 address")
	}
	return pass(fmt.Sprintf("%s on %s", shown, name), fmt.Sprintf("%d: %s: <UP> link/ether %s", f.GetIndex(), name, f.GetMac()))
}

// shownRanges is how many are told in one line.
const shownRanges = 3

func checkDHCP(d *v1.DHCPFacts) finding {
	if !d.GetServing() {
		return fail("does not serve: " + cmp.Or(d.GetError(), "it is not running"))
	}
	ranges := d.GetRanges()
	if len(ranges) == 0 { // a hub of before
		ranges = []string{d.GetRangeFirst() + "-" + d.GetRangeLast()}
	}
	shown := strings.Join(ranges[:min(len(ranges), shownRanges)], ", ")
	if more := len(ranges) - shownRanges; more > 0 {
		shown += " and " + count(more, "more range", "more ranges")
	}
	found := pass(fmt.Sprintf("%s on %s, %d active, %d free", shown, d.GetInterface(), d.GetActive(), d.GetFree()),
		"unit: isc-dhcp-server.service", "port: 67/udp on "+d.GetInterface(), "subnet: "+d.GetSubnet())
	var odd []string
	for _, other := range d.GetForeign() {
		s := fmt.Sprintf("another DHCP server is on the segment: %s at %s", other.GetServer(), other.GetMac())
		if other.GetOffers() != "" {
			s += ", which offers " + other.GetOffers()
		}
		odd = append(odd, s)
	}
	if ago := d.GetSinceConflict(); ago != nil && ago.AsDuration() < lately {
		odd = append(odd, fmt.Sprintf("an address was found in use by another card %s ago, %s so far", age(ago.AsDuration()), count(int(d.GetConflicts()), "time", "times")))
	}
	if ago := d.GetSinceExhausted(); ago != nil && ago.AsDuration() < lately {
		odd = append(odd, fmt.Sprintf("no address was free for a client %s ago, %s so far", age(ago.AsDuration()), count(int(d.GetExhausted()), "time", "times")))
	}
	if len(odd) > 0 {
		found.status, found.detail = Warn, strings.Join(append(odd, found.detail), "; ")
	}
	return found
}

// lately is how long what was odd once is still told.
const lately = 10 * time.Minute

func checkDHCPConfig(d *v1.DHCPFacts) finding {
	if strings.TrimSpace(d.GetConfig()) == "" {
		return fail(d.GetConfigFile() + " is empty")
	}
	notes := []string{"file: " + d.GetConfigFile(), "file: " + d.GetDefaultsFile()}
	return pass(fmt.Sprintf("%s, leases for %s, at most %s", d.GetConfigFile(), age(d.GetDefaultLease().AsDuration()), age(d.GetMaxLease().AsDuration())),
		append(notes, strings.Split(strings.TrimSpace(d.GetConfig()), "\n")...)...)
}

func (s *survey) checkLeases(d *v1.DHCPFacts) finding {
	leases, err := s.hub.leases()
	if err != nil {
		return fail("list leases: " + said(err))
	}
	notes := []string{"file: " + d.GetLeasesFile()}
	kept, waiting := 0, 0
	for _, l := range leases {
		note := fmt.Sprintf("%s %s %s %s", l.GetIp(), holder(l), cmp.Or(l.GetHostname(), "-"), l.GetState())
		if l.GetEnds() != nil {
			note += " until " + l.GetEnds().AsTime().UTC().Format("2006-01-02 15:04:05")
		} else {
			waiting++
		}
		if l.GetReserved() {
			kept++
		}
		notes = append(notes, note)
	}
	detail := fmt.Sprintf("%d in %s", len(leases)-waiting, d.GetLeasesFile())
	if kept > 0 {
		detail += ", " + count(kept, "address", "addresses") + " kept for a client"
	}
	found := pass(detail, notes...)
	if d.GetFree() == 0 {
		found.status, found.detail = Fail, "no address is free: "+found.detail
	}
	return found
}

// holder is who has a lease, or whom its address is kept for: a card, a client that calls
// itself so, or a microVM.
func holder(l *v1.Lease) string {
	switch id := net.HardwareAddr(l.GetClientId()).String(); {
	case l.GetMac() != "":
		return l.GetMac()
	case id != "":
		return "client id " + id
	}
	return cmp.Or(l.GetMicrovm(), "-")
}

func checkForwarding(n *v1.NATFacts) finding {
	if !n.GetForwarding() {
		return fail(fmt.Sprintf("the kernel does not forward between %s and %s; `ingot up` sets it again", n.GetInside(), n.GetOutside()))
	}
	return pass(n.GetInside() + " to " + n.GetOutside())
}

// ruleSteps is one check a rule, named by it.
func ruleSteps(n *v1.NATFacts) []step {
	present := map[string]bool{}
	var names []string
	add := func(rule string, is bool) {
		if _, ok := present[rule]; !ok {
			names = append(names, rule)
		}
		present[rule] = is
	}
	for _, r := range n.GetRules() {
		add(r.GetRule(), r.GetPresent())
	}
	for _, rule := range n.GetMissing() {
		add(rule, false)
	}
	steps := make([]step, len(names))
	for i, rule := range names {
		steps[i] = step{name: rule, check: func(context.Context) finding {
			if !present[rule] {
				return fail("not in force; `ingot up` sets it again")
			}
			return pass("in force")
		}}
	}
	if len(names) == 0 {
		steps = []step{{name: "rules", check: func(context.Context) finding { return fail("there are none; `ingot up` sets them again") }}}
	}
	return steps
}

func checkDNS(d *v1.DNSFacts) finding {
	if !d.GetServing() {
		return fail("does not serve: " + cmp.Or(d.GetError(), "it is not running"))
	}
	return pass(fmt.Sprintf("on %s, %s", strings.Join(d.GetListen(), ", "), count(int(d.GetNames()), "name", "names")), "port: 53 udp and tcp", "forwards to: "+cmp.Or(strings.Join(d.GetUpstreams(), ", "), "nobody"))
}

// checkHeard says of which hosts the hub does not know what they have now.
func checkHeard(hosts []*v1.HeardHost) finding {
	n := 0
	var silent, notes []string
	for _, h := range hosts {
		n += int(h.GetMicrovms())
		notes = append(notes, fmt.Sprintf("%s: %s", h.GetName(), count(int(h.GetMicrovms()), "microVM", "microVMs")))
		if !h.GetHeard() {
			silent = append(silent, fmt.Sprintf("%s is not heard for %s, and has %s as it had then: %s", h.GetName(), age(h.GetSilent().AsDuration()),
				count(int(h.GetMicrovms()), "microVM", "microVMs"), cmp.Or(h.GetError(), "it was not reached yet")))
		}
	}
	found := pass(fmt.Sprintf("%d known of %s", n, count(len(hosts), "host", "hosts")), notes...)
	if len(silent) > 0 {
		found.status, found.detail = Warn, strings.Join(silent, "; ")
	}
	return found
}

func checkRegistry(r *v1.RegistryFacts) finding {
	if !r.GetServing() {
		return fail("does not serve: " + cmp.Or(r.GetError(), "it is not running"))
	}
	return pass(fmt.Sprintf("on %s, %s", r.GetAddress(), count(len(r.GetRepositories()), "repository", "repositories")),
		"directory: "+r.GetDir(), "repositories: "+strings.Join(r.GetRepositories(), ", "))
}
