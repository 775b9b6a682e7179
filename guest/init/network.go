package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// network keeps the guest's interfaces as they are to be: static addresses at
// once, leases for as long as they are renewed.
type network struct {
	hostname string
	stop     context.CancelFunc
	clients  sync.WaitGroup

	mu        sync.Mutex
	etc       string // where resolv.conf is written; empty until the root is there
	resolvers map[string]resolver
}

type resolver struct {
	servers []netip.Addr
	domain  string
}

// startNetwork names the cards, sets what is static, and begins to ask for the
// rest, without waiting for an answer. What is wrong with one card is said and
// keeps no other from working.
func startNetwork(ctx context.Context, o options) *network {
	ctx, stop := context.WithCancel(ctx)
	n := &network{hostname: o.hostname, stop: stop, resolvers: map[string]resolver{}}
	defer func() { report(up("lo")) }() // last: a server's answer takes its time
	cards, err := interfaces()
	if err != nil {
		say("list interfaces: %v", err)
		return n
	}
	wanted := defaultNICs(o.nic)
	if o.network != "" {
		wanted = parseNetwork(o.network)
	}
	found := match(cards, wanted)
	slices.SortStableFunc(found, func(a, b matched) int { return askFirst(a.nic) - askFirst(b.nic) })
	for _, m := range found {
		n.configure(ctx, m.card, m.nic)
	}
	return n
}

// askFirst orders those that ask for an address before those that have one.
func askFirst(w nic) int {
	if w.dhcp {
		return 0
	}
	return 1
}

func report(err error) {
	if err != nil {
		say("%v", err)
	}
}

// matched is a card and what it is to be.
type matched struct {
	card iface
	nic  nic
}

// match finds each wanted interface's card: by MAC, else by name, else, for one
// without a MAC, the first card that nobody wants. Then it renames cards.
func match(cards []iface, wanted []nic) []matched {
	var found []matched
	take := func(w nic, is func(iface) bool) bool {
		i := slices.IndexFunc(cards, is)
		if i >= 0 {
			found = append(found, matched{cards[i], w})
			cards = slices.Delete(slices.Clone(cards), i, i+1)
		}
		return i >= 0
	}
	var open []nic
	for _, w := range wanted {
		if !take(w, func(c iface) bool { return w.mac != "" && c.mac == w.mac }) && w.mac == "" {
			open = append(open, w)
		}
	}
	for _, w := range open {
		if !take(w, func(c iface) bool { return c.name == w.name }) {
			take(w, func(iface) bool { return true })
		}
	}
	renameAll(found)
	return found
}

// renameAll gives the cards their names, by way of names that nothing has.
func renameAll(found []matched) {
	var changed []*matched
	for i := range found {
		m := &found[i]
		if m.card.name == m.nic.name {
			continue
		}
		temporary := fmt.Sprintf("ingot%d", m.card.index)
		if err := rename(m.card.name, temporary); err != nil {
			say("%v", err)
			continue
		}
		m.card.name = temporary
		changed = append(changed, m)
	}
	for _, m := range changed {
		// A card that nothing was wanted of may have the name.
		if holder := holderOf(m.nic.name); holder > 0 {
			report(rename(m.nic.name, fmt.Sprintf("ingot%d", holder)))
		}
		if err := rename(m.card.name, m.nic.name); err != nil {
			say("%v", err)
			continue
		}
		m.card.name = m.nic.name
	}
}

// holderOf is the index of the card with a name, or 0.
func holderOf(name string) int {
	cards, err := interfaces()
	if err != nil {
		return 0
	}
	for _, c := range cards {
		if c.name == name {
			return c.index
		}
	}
	return 0
}

func (n *network) configure(ctx context.Context, card iface, w nic) {
	if err := up(card.name); err != nil {
		say("%v", err)
		return
	}
	aliases := 0
	for _, p := range w.addresses {
		label := card.name
		if p.Addr().Is4() {
			if aliases > 0 {
				label = fmt.Sprintf("%s:%d", card.name, aliases)
			}
			aliases++
		}
		report(setAddress(label, card.index, p))
	}
	for _, g := range w.gateways {
		report(setGateway(card.name, card.index, g))
	}
	if len(w.nameservers) > 0 {
		n.resolve(card.name, resolver{servers: w.nameservers})
	}
	if w.dhcp {
		var before []route
		bound := func(l lease) {
			n.bound(card, l, before)
			before = l.routes
		}
		c := &dhcpClient{card: card, hostname: n.hostname, bound: bound, lost: func() { report(clearAddress(card.name)) }}
		n.clients.Go(func() { report(c.run(ctx)) })
	}
}

// bound sets what a new or renewed lease says. Of the routes that were there before, by
// the lease before, it takes away those that it has not.
func (n *network) bound(card iface, l lease, before []route) {
	if l.mtu > 0 {
		report(setMTU(card.name, l.mtu))
	}
	report(setAddress(card.name, card.index, l.address))
	for _, r := range before {
		if !slices.Contains(l.routes, r) {
			report(setRoute(card.name, r, false))
		}
	}
	// Those on the link first, by which others may be reached.
	for _, link := range []bool{true, false} {
		for _, r := range l.routes {
			if r.via.IsUnspecified() == link {
				report(setRoute(card.name, r, true))
			}
		}
	}
	n.resolve(card.name, resolver{l.dns, l.domain})
}

// close stops asking. Addresses stay.
func (n *network) close() {
	n.stop()
	n.clients.Wait()
}

// resolve takes an interface's name servers.
func (n *network) resolve(name string, r resolver) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resolvers[name] = r
	n.write()
}

// useRoot says where the root's /etc is, from now on.
func (n *network) useRoot(etc string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.etc = etc
	n.write()
}

// write writes resolv.conf; n.mu is held.
func (n *network) write() {
	if n.etc == "" || len(n.resolvers) == 0 {
		return
	}
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(n.resolvers)) {
		r := n.resolvers[name]
		if r.domain != "" {
			fmt.Fprintf(&text, "search %s\n", r.domain)
		}
		for _, s := range r.servers {
			fmt.Fprintf(&text, "nameserver %s\n", s)
		}
	}
	report(replace(filepath.Join(n.etc, "resolv.conf"), text.String()))
}

// replace writes a file in the place of whatever is there, a dead link too. A
// root that is read-only keeps what it has.
func replace(path, text string) error {
	if have, err := os.ReadFile(path); err == nil && string(have) == text {
		return nil
	}
	temporary := path + ".ingot"
	if err := os.WriteFile(temporary, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
