package hub

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"ingot/internal/run"
)

// lookup is what DNS answers for a name of the environment, in lower case: a machine, a
// microVM by NAME.NAMESPACE or NAME, or else a client of DHCP by the host name that it
// gives itself. So no client can take the name of the former. What is there, and has no
// address, has the zero value.
func (h *Hub) lookup(name string) (netip.Addr, bool) {
	if ip, ok := h.machine(name); ok {
		return ip, true
	}
	if g := h.guests.named(name); g != nil {
		return h.address(g), true
	}
	if ip, ok := h.dhcp.Lookup(name); ok {
		return ip, true
	}
	return netip.Addr{}, h.guests.above(name)
}

// ownName is the hub's, as a machine.
func (h *Hub) ownName() string {
	if name, ok := h.machineAt(h.c.Address); ok {
		return name
	}
	return "hub"
}

// names are how many machines and microVMs have a name and an address now.
func (h *Hub) names() int {
	n := len(h.c.Machines)
	for _, g := range h.guests.all() {
		if h.address(g).IsValid() {
			n++
		}
	}
	return n
}

func (h *Hub) machine(name string) (netip.Addr, bool) {
	for _, m := range h.c.Machines {
		if strings.EqualFold(m.Name, name) {
			return m.Address, true
		}
	}
	return netip.Addr{}, false
}

func (h *Hub) machineAt(ip netip.Addr) (string, bool) {
	for _, m := range h.c.Machines {
		if m.Address == ip {
			return strings.ToLower(m.Name), true
		}
	}
	return "", false
}

// address is a microVM's: of its first card that has one, by its spec or by a lease; zero:
// none has one now.
func (h *Hub) address(g *guest) netip.Addr {
	for _, c := range g.Cards {
		if c.Address.Is4() {
			return c.Address
		}
		if ip, ok := h.dhcp.AddressOf(c.hardware()); ok {
			return ip
		}
	}
	return netip.Addr{}
}

// leased is the address that a microVM has by DHCP; zero: none.
func (h *Hub) leased(g *guest) netip.Addr {
	for _, c := range g.Cards {
		if ip, ok := h.dhcp.AddressOf(c.hardware()); ok {
			return ip
		}
	}
	return netip.Addr{}
}

// microVM is whose a card is, as reservations have it.
func (h *Hub) microVM(mac net.HardwareAddr) string {
	if g := h.guests.withMAC(mac); g != nil {
		return g.String()
	}
	return ""
}

// taken says whether a spec gives an address to another card than this.
func (h *Hub) taken(ip netip.Addr, mac net.HardwareAddr) bool {
	g := h.guests.withAddress(ip)
	return g != nil && !slices.ContainsFunc(g.Cards, func(c card) bool { return c.Address == ip && bytes.Equal(c.hardware(), mac) })
}

// forget ends the leases of microVMs that are gone: whoever comes next under the name of
// one has another card, and may have to have the same address.
func (h *Hub) forget(ctx context.Context, ready func()) error {
	for _, part := range []run.Task{h.heard, h.dhcp} {
		select {
		case <-part.Ready():
		case <-ctx.Done():
			return nil
		}
	}
	ready()
	known := map[string]card{}
	for {
		changed := h.guests.changes()
		now := map[string]card{}
		for _, g := range h.guests.all() {
			for _, c := range g.Cards {
				now[c.MAC] = c
			}
		}
		for mac, c := range known {
			if _, there := now[mac]; there {
				continue
			}
			ip, ok := h.dhcp.AddressOf(c.hardware())
			if !ok {
				continue
			}
			if err := h.dhcp.Release(ip); err != nil && !errdefs.IsNotFound(err) {
				h.log.Error("release the address of a microVM that is gone", "err", err)
			}
		}
		known = now
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// nameOf is the name of what has an address, in lower case: it is one that lookup knows.
func (h *Hub) nameOf(ip netip.Addr) (string, bool) {
	if name, ok := h.machineAt(ip); ok {
		return name, true
	}
	g := h.guests.withAddress(ip)
	if mac, ok := h.dhcp.CardOf(ip); ok {
		g = h.guests.withMAC(mac)
	}
	if g != nil {
		name := strings.ToLower(g.Name + "." + g.Namespace)
		return name, h.guests.named(name) == g // another may have it
	}
	name, ok := h.dhcp.NameOf(ip)
	if at, _ := h.lookup(strings.ToLower(name)); at != ip {
		return "", false // it is somebody else's
	}
	return strings.ToLower(name), ok
}
