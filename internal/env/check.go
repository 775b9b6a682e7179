package env

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"ingot/api/types"
	"ingot/internal/hub"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

const (
	nameRule     = "only lower-case letters, digits and dashes, at most 32"
	hostnameRule = "only lower-case letters, digits and dashes, none of them first or last, at most 63"
)

var (
	validName     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
	validHostname = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

// ValidName says whether an environment can be called so: its name becomes that of
// directories and interfaces, and a part of DNS names.
func ValidName(name string) bool { return validName.MatchString(name) }

// usualSubnet and usualUplink are what is taken, or what is like them, where a
// file says nothing.
var (
	usualSubnet = netip.MustParsePrefix("192.168.10.0/25")
	usualUplink = netip.MustParsePrefix("100.64.0.0/30")
)

// usualMachines are those of a file without machines.
func usualMachines() []Machine {
	return []Machine{{Name: "network-hub", Hub: true}, {Name: "host-0", Host: true}, {Name: "host-1", Host: true}}
}

// check finds all that is wrong with a declaration as such, whatever the machine
// is like on which it is brought up.
func (d *Declaration) check(m *mistakes) {
	if !d.has("machines") {
		d.Machines = usualMachines()
	}
	d.checkNetwork(m)
	d.checkMachines(m)
	d.checkMicroVMs(m)
	d.checkReserved(m)
	d.checkMachinesAddresses(m, d.Machines)
	d.checkPorts(m)
}

func (d *Declaration) checkNetwork(m *mistakes) {
	if d.Subnet.IsValid() && (d.Subnet.Bits() < 8 || d.Subnet.Bits() > 29) {
		m.add("subnet", "%s has no useful size: from /8 to /29", d.Subnet)
		d.Subnet = netip.Prefix{}
	}
	if d.Subnet.IsValid() && !forMachines(d.Subnet) {
		m.add("subnet", "%s is not for machines", d.Subnet)
	}
	if d.Uplink.IsValid() && !forMachines(d.Uplink) {
		m.add("uplink", "%s is not for machines", d.Uplink)
	}
	if d.Uplink.IsValid() && (d.Uplink.Bits() < 16 || d.Uplink.Bits() > 30) {
		m.add("uplink", "%s has no useful size: two addresses are needed, a /30", d.Uplink)
	}
	if d.Subnet.IsValid() && d.Uplink.IsValid() && d.Subnet.Overlaps(d.Uplink) {
		m.add("uplink", "%s overlaps with subnet %s", d.Uplink, d.Subnet)
	}
	d.checkVPN(m)
	d.checkTailscale(m)
	d.checkDHCP(m)
}

// forMachines is false for the blocks that the kernel or the world keeps for
// something else: this network, loopback, link-local, multicast, reserved.
func forMachines(p netip.Prefix) bool {
	first := p.Addr().As4()[0]
	return p.Addr().IsGlobalUnicast() && first != 0 && first < 224
}

func (d *Declaration) checkMachines(m *mistakes) {
	names, addresses := map[string]string{}, map[netip.Addr]string{}
	var hubs, hosts int
	for i := range d.Machines {
		one, key := &d.Machines[i], fmt.Sprintf("machines[%d]", i)
		if d.has("machines") {
			d.checkMachine(m, key, one)
		}
		if first := names[one.Name]; first != "" && one.Name != "" {
			m.add(key+".name", "%s is there already in line %d", one.Name, d.lines[first+".name"])
		}
		names[one.Name] = key
		if first := addresses[one.Address]; first != "" && one.Address.IsValid() {
			m.add(key+".address", "%s is there already in line %d", one.Address, d.lines[first+".address"])
		}
		addresses[one.Address] = key
		if one.Hub {
			hubs++
		}
		if one.Host {
			hosts++
		}
	}
	wrong := slices.ContainsFunc(m.all, func(m *Mistake) bool { return strings.Contains(m.Key, ".roles") })
	switch {
	case wrong: // whose role is whose is not known
	case hubs != 1:
		m.add("machines", "one machine must have the role hub, and %d have it", hubs)
	case hosts == 0:
		m.add("machines", "no machine has the role host")
	}
	if len(m.all) > 0 {
		return // who has which address makes no sense then
	}
	subnet := d.Subnet
	if !subnet.IsValid() {
		subnet = usualSubnet
	}
	if _, _, err := d.number(subnet, nil); err != nil {
		m.add(err.Key, "%s", err.Problem)
	}
}

func (d *Declaration) checkMachine(m *mistakes, key string, one *Machine) {
	switch {
	case !d.has(key + ".name"):
		m.add(key, "it has no name")
	case one.Name != "" && !validHostname.MatchString(one.Name):
		m.add(key+".name", "%q is not a machine's name: %s", one.Name, hostnameRule)
	}
	if one.Address.IsValid() {
		in := slices.ContainsFunc(d.DHCP.Ranges, func(r hub.Range) bool { return r.Contains(one.Address) })
		if d.checkIn(m, key+".address", d.given()[0], one.Address) && in {
			m.add(key+".address", "%s is in the DHCP range, %s: guests are given it", one.Address, ranges(d.DHCP.Ranges))
		}
	}
	if !d.has(key + ".roles") {
		m.add(key, "it has no roles: [hub], [host] or [hub, host]")
	} else if !one.Hub && !one.Host && !slices.ContainsFunc(m.all, func(m *Mistake) bool { return strings.HasPrefix(m.Key, key+".roles") }) {
		m.add(key+".roles", "it has none: hub or host")
	}
}

func (d *Declaration) checkMicroVMs(m *mistakes) {
	seen := map[string]string{}
	for i := range d.MicroVMs {
		one, key := &d.MicroVMs[i], fmt.Sprintf("microvms[%d]", i)
		if !d.has(key + ".name") {
			m.add(key, "it has no name")
			continue
		}
		if first := seen[one.String()]; first != "" {
			m.add(key+".name", "%s is there already in line %d", one, d.lines[first+".name"])
		}
		seen[one.String()] = key
		at := slices.IndexFunc(d.Machines, func(m Machine) bool { return m.Name == one.Host })
		if one.Host != "" && (at < 0 || !d.Machines[at].Host) {
			m.add(key+".host", "%s is not a host of this environment", one.Host)
		}
		if _, ok := RestartPolicies[one.Restart]; one.Restart != "" && !ok {
			m.add(key+".restart", "%q: it must be always, on-failure or never", one.Restart)
		}
		if _, ok := one.Labels[declared]; ok {
			m.add(key+".labels."+declared, "this label is `ingot up`'s own")
		}
		d.checkSpec(m, key, *one)
	}
}

// fileKeys are the file's words for those of the API.
var fileKeys = map[string]string{
	"id": "name", "vcpu": "cpus", "memory_in_mb": "memory", "root_volume": "image", "kernel": "kernel",
	"initrd": "kernel", "provider": "driver", "namespace": "namespace",
	"allowed_addresses": "allowed_addresses",
}

// checkSpec holds a microVM to what hosts will hold it to.
func (d *Declaration) checkSpec(m *mistakes, key string, one MicroVM) {
	if d.has(key + ".spec") {
		for _, other := range []string{"image", "kernel", "driver", "cpus", "memory", "disk", "command", "env", "labels", "restart", "allowed_addresses"} {
			if d.has(key + "." + other) {
				m.add(key+"."+other, "it can't stand beside spec, which has it in its own words")
			}
		}
	} else if !d.has(key + ".image") {
		m.add(key, "it has no image")
		return
	}
	// What was said already was said in the file's own words.
	said := map[string]bool{}
	for _, one := range m.all {
		said[one.Key] = true
	}
	add := func(key, format string, a ...any) {
		if !said[key] {
			m.add(key, format, a...)
		}
	}
	p, err := one.Proto()
	if err != nil {
		add(key+".spec", "%v", err)
		return
	}
	spec, err := wire.SpecFromProto(p)
	if err == nil {
		spec.Normalize()
		err = spec.Validate()
	}
	for _, err := range parts(err) {
		var field *vm.FieldError
		if !errors.As(err, &field) {
			add(key, "%v", err)
			continue
		}
		word, ok := fileKeys[strings.FieldsFunc(field.Field, func(r rune) bool { return r == '.' || r == '[' })[0]]
		if ok && (!d.has(key+".spec") || word == "name" || word == "namespace") {
			add(key+"."+word, "%s", field.Problem)
		} else {
			add(key+".spec", "%s: %s", field.Field, field.Problem)
		}
	}
	d.checkMacvtap(m, key, one, p)
}

// checkMacvtap refuses what can't work: a machine does not reach guests that sit
// on its own interface, and so a hub none of their requests.
func (d *Declaration) checkMacvtap(m *mistakes, key string, one MicroVM, p *types.MicroVMSpec) {
	for i, n := range p.GetInterfaces() {
		for _, host := range d.Machines {
			if n.GetType() == types.NetworkInterface_MACVTAP && host.Name == one.Host && host.Hub {
				m.add(key+".spec", "interfaces[%d]: %s is the hub too, which a macvtap guest of its own can't reach: use TAP", i, host.Name)
			}
		}
	}
}

// parts are the errors that errors.Join has joined.
func parts(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}
