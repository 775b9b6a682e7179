package dhcp

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// reservations are found by address, and by all that a client may be known by.
// A client may have one in each subnet.
type reservations struct {
	byIP   map[addr4]*Reservation
	byMAC  map[[6]byte][]*Reservation
	byVM   map[string][]*Reservation
	byID   map[string][]*Reservation
	byName map[string][]*Reservation
}

func newReservations() reservations {
	return reservations{
		byIP: map[addr4]*Reservation{}, byMAC: map[[6]byte][]*Reservation{}, byVM: map[string][]*Reservation{},
		byID: map[string][]*Reservation{}, byName: map[string][]*Reservation{},
	}
}

func (b reservations) add(r Reservation) {
	if old := b.byIP[from(r.IP)]; old != nil {
		b.remove(old)
	}
	b.byIP[from(r.IP)] = &r
	if len(r.MAC) == 6 {
		b.byMAC[[6]byte(r.MAC)] = append(b.byMAC[[6]byte(r.MAC)], &r)
	}
	if r.MicroVM != "" {
		b.byVM[r.MicroVM] = append(b.byVM[r.MicroVM], &r)
	}
	if len(r.ClientID) > 0 {
		b.byID[string(r.ClientID)] = append(b.byID[string(r.ClientID)], &r)
	}
	if r.Name != "" {
		name := strings.ToLower(r.Name)
		b.byName[name] = append(b.byName[name], &r)
	}
}

func (b reservations) remove(r *Reservation) {
	delete(b.byIP, from(r.IP))
	if len(r.MAC) == 6 {
		without(b.byMAC, [6]byte(r.MAC), r)
	}
	without(b.byVM, r.MicroVM, r)
	without(b.byID, string(r.ClientID), r)
	without(b.byName, strings.ToLower(r.Name), r)
}

func without[K comparable](m map[K][]*Reservation, key K, r *Reservation) {
	m[key] = slices.DeleteFunc(m[key], func(x *Reservation) bool { return x == r })
	if len(m[key]) == 0 {
		delete(m, key)
	}
}

// of is the client's reservation in a subnet.
func (b reservations) of(p *pool, m *message, name string) *Reservation {
	in := func(all []*Reservation) *Reservation {
		for _, r := range all {
			if p.prefix.Contains(r.IP) {
				return r
			}
		}
		return nil
	}
	if r := in(b.byMAC[m.mac]); r != nil {
		return r
	}
	if m.vm != "" {
		if r := in(b.byVM[m.vm]); r != nil {
			return r
		}
	}
	if len(m.id) > 0 {
		if r := in(b.byID[string(m.id)]); r != nil {
			return r
		}
	}
	if name != "" {
		return in(b.byName[strings.ToLower(name)])
	}
	return nil
}

func (r Reservation) equal(x Reservation) bool {
	return r.IP == x.IP && bytes.Equal(r.MAC, x.MAC) && r.MicroVM == x.MicroVM && bytes.Equal(r.ClientID, x.ClientID) && strings.EqualFold(r.Name, x.Name)
}

// client names whoever an address is kept for.
func (r Reservation) client() string {
	switch {
	case len(r.MAC) > 0:
		return r.MAC.String()
	case r.MicroVM != "":
		return "microVM " + r.MicroVM
	case len(r.ClientID) > 0:
		return fmt.Sprintf("client identifier %x", r.ClientID)
	}
	return r.Name
}

// asMessage is what the client would say of itself.
func (r Reservation) asMessage() (*message, error) {
	if len(r.MAC) != 0 && len(r.MAC) != 6 || len(r.MAC) == 0 && r.MicroVM == "" && len(r.ClientID) == 0 && r.Name == "" {
		return nil, fmt.Errorf("it names no client: %w", errdefs.ErrInvalidArgument)
	}
	m := &message{vm: r.MicroVM, id: r.ClientID, hostname: []byte(r.Name)}
	copy(m.mac[:], r.MAC)
	return m, nil
}
