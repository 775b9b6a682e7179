package env

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
)

// Range is what guests are given, both ends included.
type Range struct{ First, Last netip.Addr }

// maxRange bounds what the DHCP server keeps count of.
const maxRange = 1 << 16

func (r Range) valid() bool { return r.First.IsValid() && r.Last.IsValid() }

func (r Range) contains(a netip.Addr) bool {
	return r.valid() && !a.Less(r.First) && !r.Last.Less(a)
}

func (r Range) size() uint32 { return number(r.Last) - number(r.First) + 1 }

func (r Range) String() string { return fmt.Sprintf("%s - %s", r.First, r.Last) }

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

// number gives each machine an address, and guests their range: what the file
// says, else what had is of the machine's name, else the first that is free.
func (d *Declaration) number(subnet netip.Prefix, had map[string]netip.Addr) ([]Machine, Range, *Mistake) {
	machines, guests := slices.Clone(d.Machines), d.DHCP
	big := size(subnet) >= roomy
	if !guests.valid() && big {
		guests = Range{at(subnet, firstGuest), at(subnet, min(size(subnet)-2, firstGuest+maxRange-1))}
	}
	used := map[netip.Addr]string{}
	for _, m := range machines {
		used[m.Address] = m.Name
	}
	free := func(a netip.Addr) bool {
		return used[a] == "" && subnet.Contains(a) && !guests.contains(a) && a != broadcast(subnet) && !(big && a == at(subnet, kept))
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
			for ; subnet.Contains(at(subnet, n)) && !free(at(subnet, n)); n++ {
			}
			if !free(at(subnet, n)) {
				return nil, Range{}, d.mistake(fmt.Sprintf("machines[%d]", i), "no address of %s is left for it", subnet)
			}
			give(i, at(subnet, n))
		}
	}
	if !guests.valid() {
		highest := at(subnet, hubPlace)
		for _, m := range machines {
			if highest.Less(m.Address) {
				highest = m.Address
			}
		}
		guests = Range{highest.Next(), at(subnet, size(subnet)-2)}
		if guests.Last.Less(guests.First) {
			return nil, Range{}, d.mistake("subnet", "no address of %s after those of the machines is left for guests: it is too small, or `dhcp` must say which are theirs", subnet)
		}
	}
	for i, m := range machines {
		if guests.contains(m.Address) {
			return nil, Range{}, d.mistake(fmt.Sprintf("machines[%d].address", i), "%s is in the DHCP range, %s: guests are given it", m.Address, guests)
		}
	}
	return machines, guests, nil
}
