package env

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"ingot/internal/hub"
)

// maxRange bounds what the DHCP server keeps count of in a network.
const maxRange = 1 << 16

func number(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()) }

// at is the nth address of a subnet.
func at(p netip.Prefix, n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, number(p.Masked().Addr())+n)))
}

// size is how many addresses a subnet has.
func size(p netip.Prefix) uint32 { return 1 << (32 - p.Bits()) }

func broadcast(p netip.Prefix) netip.Addr { return at(p, size(p)-1) }

// The places of a subnet of at least roomy addresses: the hub, hosts, one address
// kept for a cluster, and guests from firstGuest on. In a smaller one guests
// follow the machines.
const (
	hubPlace   = 2
	hostPlace  = 3
	kept       = 25
	firstGuest = 26
	roomy      = 64
)

// number gives each machine an address, and guests their ranges: what the file
// says, else what had is of the machine's name, else the first that is free.
func (d *Declaration) number(subnet netip.Prefix, had map[string]netip.Addr) ([]Machine, []hub.Range, *Mistake) {
	machines, guests := slices.Clone(d.Machines), d.DHCP.Ranges
	big := size(subnet) >= roomy
	if len(guests) == 0 && big {
		guests = []hub.Range{{First: at(subnet, firstGuest), Last: at(subnet, min(size(subnet)-2, firstGuest+maxRange-1))}}
	}
	given := func(a netip.Addr) bool {
		return slices.ContainsFunc(guests, func(r hub.Range) bool { return r.Contains(a) })
	}
	used := map[netip.Addr]string{}
	for _, m := range machines {
		used[m.Address] = m.Name
	}
	free := func(a netip.Addr) bool {
		return used[a] == "" && subnet.Contains(a) && !given(a) && a != broadcast(subnet) && !(big && a == at(subnet, kept))
	}
	excluded := func(a netip.Addr) bool {
		return slices.ContainsFunc(d.DHCP.Exclude, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	give := func(i int, a netip.Addr) { machines[i].Address, used[a] = a, machines[i].Name }
	for i, m := range machines {
		if a := had[m.Name]; !m.Address.IsValid() && a.IsValid() && free(a) {
			give(i, a)
		}
	}
	for _, hub := range []bool{true, false} { // the hub chooses first
		for i, m := range machines {
			if m.Hub != hub || m.Address.IsValid() {
				continue
			}
			n := uint32(hostPlace)
			if hub {
				n = hubPlace
			}
			for ; subnet.Contains(at(subnet, n)) && (!free(at(subnet, n)) || excluded(at(subnet, n))); n++ {
			}
			if !free(at(subnet, n)) {
				return nil, nil, d.mistake(fmt.Sprintf("machines[%d]", i), "no address of %s is left for it", subnet)
			}
			give(i, at(subnet, n))
		}
	}
	if len(guests) == 0 {
		highest := at(subnet, hubPlace)
		for _, m := range machines {
			if highest.Less(m.Address) {
				highest = m.Address
			}
		}
		rest := hub.Range{First: highest.Next(), Last: at(subnet, size(subnet)-2)}
		if rest.Last.Less(rest.First) {
			return nil, nil, d.mistake("subnet", "no address of %s after those of the machines is left for guests: it is too small, or `dhcp` must say which are theirs", subnet)
		}
		guests = []hub.Range{rest}
	}
	for i, m := range machines {
		if given(m.Address) {
			return nil, nil, d.mistake(fmt.Sprintf("machines[%d].address", i), "%s is in the DHCP range, %s: guests are given it", m.Address, ranges(guests))
		}
	}
	return machines, guests, nil
}
