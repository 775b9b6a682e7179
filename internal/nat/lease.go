package nat

import (
	"bytes"
	"cmp"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// lookEach is how often a guard looks what the kernel has learnt and refused.
const lookEach = 10 * time.Second

// Refusal is an address that a guest has tried to send from lately.
type Refusal struct {
	Device  string
	Address netip.Addr
	Packets uint64
}

// look reads what the kernel has learnt of leases, and takes from it what is over: a
// guest has one address at a time, an address one guest. Where the sets are gone, or
// an earlier version had none, the guests whose leases are lost with them are not
// held to one until it is known again. The caller holds g.mu, or is the only one.
func (g *Guard) look() (refused []Refusal, err error) {
	if g.h.Segment == "" {
		return nil, nil
	}
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	for _, p := range places {
		s := newSets(&nftables.Table{Family: p.family, Name: Table})
		if err := g.lookForLeases(c, s, p.devices); err != nil {
			return nil, fmt.Errorf("read guests' leases: %w", err)
		}
		for _, set := range []*nftables.Set{s.refused, s.refused6} {
			all, _, err := elements(c, set)
			if err != nil {
				return nil, fmt.Errorf("read refused addresses: %w", err)
			}
			for _, e := range all {
				if r := refusal(set, s, e); g.known.refuses(r) {
					refused = append(refused, r)
				}
			}
		}
	}
	slices.SortFunc(refused, func(a, b Refusal) int {
		return cmp.Or(strings.Compare(a.Device, b.Device), a.Address.Compare(b.Address))
	})
	return refused, nil
}

// refuses says whether an address is still one that a guest can't use.
func (k known) refuses(r Refusal) bool {
	guest, there := k.guests[r.Device]
	allowed := slices.ContainsFunc(guest.Allowed, func(p netip.Prefix) bool { return p.Contains(r.Address) })
	return there && !allowed && k.leases[r.Device].address != r.Address
}

func refusal(set *nftables.Set, s sets, e nftables.SetElement) Refusal {
	size := 4
	if set == s.refused6 {
		size = 16
	}
	address, _ := netip.AddrFromSlice(e.Key[unix.IFNAMSIZ:][:size])
	r := Refusal{Device: keyDevice(e.Key), Address: address}
	if e.Counter != nil {
		r.Packets = e.Counter.Packets
	}
	return r
}

func (g *Guard) lookForLeases(c *nftables.Conn, s sets, devices string) error {
	leases, there, err := elements(c, s.addresses)
	if err != nil {
		return err
	}
	waiting, _, err := elements(c, s.unheld)
	if err != nil {
		return err
	}
	now := time.Now()
	if !there {
		for device := range g.known.guests {
			if _, known := g.known.leases[device]; strings.HasPrefix(device, devices) && !known {
				g.known.unheld[device] = now.Add(leaseTime)
			}
		}
		return nil
	}
	for device := range g.known.guests {
		if strings.HasPrefix(device, devices) {
			delete(g.known.leases, device)
			delete(g.known.unheld, device)
		}
	}
	for _, e := range waiting {
		if device := keyDevice(e.Key); g.known.guests[device].MAC != nil {
			g.known.unheld[device] = now.Add(e.Expires)
		}
	}
	// The newest first, whose time has run least.
	slices.SortFunc(leases, func(a, b nftables.SetElement) int {
		return cmp.Or(cmp.Compare(a.Timeout-a.Expires, b.Timeout-b.Expires), bytes.Compare(a.Key, b.Key))
	})
	taken := map[netip.Addr]bool{}
	for _, e := range leases {
		device := keyDevice(e.Key)
		address := netip.AddrFrom4([4]byte(e.Key[unix.IFNAMSIZ:]))
		if _, has := g.known.leases[device]; has || taken[address] || g.known.guests[device].MAC == nil {
			if err := drop(c, s.addresses, e.Key); err != nil {
				return err
			}
			continue
		}
		taken[address] = true
		g.known.leases[device] = lease{address, now.Add(e.Expires)}
	}
	return nil
}

// drop takes a key from a set, where it may have ended by itself.
func drop(c *nftables.Conn, set *nftables.Set, key []byte) error {
	err := c.SetDeleteElements(set, []nftables.SetElement{{Key: key}})
	if err == nil {
		err = c.Flush()
	}
	if gone(err) {
		return nil
	}
	return err
}

// prefixOf is the prefix whose first and last addresses these are.
func prefixOf(first, last []byte) netip.Prefix {
	common := 0
	for i := range first {
		same := bits.LeadingZeros8(first[i] ^ last[i])
		common += same
		if same < 8 {
			break
		}
	}
	address, _ := netip.AddrFromSlice(first)
	return netip.PrefixFrom(address, common)
}
