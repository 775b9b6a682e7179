package host

import (
	"net/netip"
	"slices"
	"time"

	"ingot/internal/vm"
)

// Refusal is an address that the guest behind a device has lately tried to send from.
type Refusal struct {
	Device  string
	Address netip.Addr
	Packets uint64
}

// mostRefused are as many addresses as a status has.
const mostRefused = 8

// Refused is told all of them whenever somebody has looked. What is new of a microVM
// becomes part of its status, and so does that it is over; the first of an interface is
// logged.
func (h *Host) Refused(all []Refusal) {
	devices := map[string][]Refusal{}
	for _, r := range all {
		devices[r.Device] = append(devices[r.Device], r)
	}
	for _, v := range h.all() {
		v.refused(devices)
	}
}

func (v *instance) refused(devices map[string][]Refusal) {
	was := v.view().Status.Refused
	var is []vm.Refusal
	changed := false
	for _, n := range v.spec.Interfaces {
		told := slices.ContainsFunc(was, func(o vm.Refusal) bool { return o.Interface == n.ID })
		for _, r := range devices[v.device(n)] {
			if len(is) == mostRefused {
				break
			}
			at := slices.IndexFunc(was, func(o vm.Refusal) bool { return o.Interface == n.ID && o.Address == r.Address })
			one := vm.Refusal{Interface: n.ID, Address: r.Address, Packets: r.Packets, Since: time.Now().UTC()}
			switch {
			case at < 0:
				if !told { // a guest may try one after the other
					v.log.Warn("guest sends from an address that is neither its own nor allowed: dropped", "interface", n.ID, "ip", r.Address, "packets", r.Packets)
				}
				told, changed = true, true
			case r.Packets < 2*was[at].Packets: // not each packet is an event
				one = was[at]
			default:
				one.Since, changed = was[at].Since, true
			}
			is = append(is, one)
		}
	}
	if changed || len(is) != len(was) {
		v.set(func(s *vm.Status) { s.Refused = is })
	}
}
