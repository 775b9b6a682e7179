package hub

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/vm"
)

// guest is a microVM as its host told of it. Who has one may keep it: it does not change.
type guest struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Host      string `json:"host"`            // the machine that it is on
	Cards     []card `json:"cards,omitempty"` // on the segment, in the spec's order
}

// card is a network card of a guest.
type card struct {
	MAC     string     `json:"mac"`              // as net.HardwareAddr writes it
	Address netip.Addr `json:"address,omitzero"` // if the spec gives it one, and not DHCP
}

// hardware is the card's MAC address for package dhcp.
func (c card) hardware() net.HardwareAddr {
	mac, err := net.ParseMAC(c.MAC)
	if err != nil {
		return nil // of a file that somebody has changed
	}
	return mac
}

// String is the name by which people know it.
func (g *guest) String() string { return g.Namespace + "/" + g.Name }

func (g *guest) equal(x *guest) bool {
	return g.String() == x.String() && slices.Equal(g.Cards, x.Cards)
}

// guests are the environment's microVMs, which their hosts tell of. Of a host that can't
// be heard they are those that it had when it was heard last, also by an earlier hub: a
// microVM outlives its host's daemon, and the hub's own. What several have, a name or a
// MAC address, is the oldest one's, so that nobody can take it from another.
//
// Whoever depends on them asks each time, which is cheap, or waits for a change:
//
//	for changed := g.changes(); ; changed = g.changes() {
//		… g.all() …
//		<-changed
//	}
type guests struct {
	file string
	dial func(Machine) (*grpc.ClientConn, error)
	log  *slog.Logger

	mu      sync.Mutex // guards all below
	hosts   map[string]*hearing
	byName  index // NAMESPACE/NAME
	byMAC   index
	byIP    index // of those that the specs give
	byLabel index // NAME.NAMESPACE, in lower case, as DNS has it
	byShort index // NAME, likewise
	byAbove index // NAMESPACE, and all else that is above a label
	changed chan struct{}
}

// hearing is what is known of a host.
type hearing struct {
	Machine
	guests  map[string]*guest // by uid
	heard   bool
	since   time.Time // when heard changed
	problem error     // why it is not heard
}

// index finds guests by a text. Several have the same in the order of their right to it.
type index map[string][]*guest

func (x index) add(key string, g *guest) {
	at, _ := slices.BinarySearchFunc(x[key], g, func(a, b *guest) int { return cmp.Or(cmp.Compare(a.UID, b.UID), cmp.Compare(a.Host, b.Host)) })
	x[key] = slices.Insert(x[key], at, g)
}

func (x index) remove(key string, g *guest) {
	if x[key] = slices.DeleteFunc(x[key], func(o *guest) bool { return o == g }); len(x[key]) == 0 {
		delete(x, key)
	}
}

// newGuests prepares to hear the hosts among some machines. The file keeps what they said.
func newGuests(machines []Machine, file string, dial func(Machine) (*grpc.ClientConn, error), log *slog.Logger) *guests {
	g := &guests{
		file: file, dial: dial, log: log, hosts: map[string]*hearing{}, changed: make(chan struct{}),
		byName: index{}, byMAC: index{}, byIP: index{}, byLabel: index{}, byShort: index{}, byAbove: index{},
	}
	for _, m := range machines {
		if m.Host {
			g.hosts[m.Name] = &hearing{Machine: m, guests: map[string]*guest{}, since: time.Now()}
		}
	}
	return g
}

// find is the microVM of a name; nil: there is none.
func (g *guests) find(namespace, name string) *guest { return g.first(g.byName, namespace+"/"+name) }

// withMAC is the microVM that has a card; nil: there is none.
func (g *guests) withMAC(mac net.HardwareAddr) *guest { return g.first(g.byMAC, mac.String()) }

// withAddress is the microVM whose spec gives it an address; nil: there is none.
func (g *guests) withAddress(ip netip.Addr) *guest { return g.first(g.byIP, ip.String()) }

// named is the microVM that a name means to DNS, which is in lower case: NAME.NAMESPACE,
// or NAME alone, for that of the default namespace before others'. nil: there is none.
func (g *guests) named(name string) *guest {
	if found := g.first(g.byLabel, name); found != nil {
		return found
	}
	if found := g.first(g.byLabel, name+"."+vm.DefaultNamespace); found != nil {
		return found
	}
	return g.first(g.byShort, name)
}

// above says whether a name, in lower case, is that of a namespace: there are names below it.
func (g *guests) above(name string) bool { return g.first(g.byAbove, name) != nil }

func (g *guests) first(by index, key string) *guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	if all := by[key]; len(all) > 0 {
		return all[0]
	}
	return nil
}

// all are all of them, the oldest first.
func (g *guests) all() []*guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*guest
	for _, h := range g.hosts {
		all = slices.AppendSeq(all, maps.Values(h.guests))
	}
	slices.SortFunc(all, func(a, b *guest) int { return cmp.Or(cmp.Compare(a.UID, b.UID), cmp.Compare(a.Host, b.Host)) })
	return all
}

// changes is closed as soon as anything is different from now.
func (g *guests) changes() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

// facts says how the hosts are heard.
func (g *guests) facts() []hearingFacts {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []hearingFacts
	for _, h := range g.hosts {
		all = append(all, hearingFacts{h.Name, h.heard, h.since, h.problem, len(h.guests)})
	}
	slices.SortFunc(all, func(a, b hearingFacts) int { return cmp.Compare(a.Host, b.Host) })
	return all
}

// hearingFacts is how a host is heard.
type hearingFacts struct {
	Host    string
	Heard   bool
	Since   time.Time // when it began or ended to be heard
	Problem error     // why it is not
	Guests  int
}

// guestsForm is the file.
type guestsForm struct {
	Format int      `json:"format"`
	Guests []*guest `json:"guests"`
}

// load reads what an earlier hub has kept. What can't be read is not known any more.
func (g *guests) load() {
	b, err := os.ReadFile(g.file)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var kept guestsForm
	if err == nil {
		err = json.Unmarshal(b, &kept)
	}
	if err == nil && kept.Format != 1 {
		err = fmt.Errorf("%s: format %d is not known to this version", g.file, kept.Format)
	}
	if err != nil {
		g.log.Warn("read the microVMs that were known: they are asked for anew", "err", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, one := range kept.Guests {
		if one == nil {
			continue // somebody has changed the file
		}
		if h := g.hosts[one.Host]; h != nil {
			g.set(h, one.UID, one)
		}
	}
}

// save keeps what is known. The file is a whole one, also after a power cut.
func (g *guests) save() error {
	if len(g.hosts) == 0 {
		return nil
	}
	b, err := json.MarshalIndent(guestsForm{1, g.all()}, "", " ")
	if err != nil {
		return fmt.Errorf("keep the microVMs that are known: %w", err)
	}
	if have, err := os.ReadFile(g.file); err == nil && bytes.Equal(have, b) {
		return nil
	}
	if err := replace(g.file, b); err != nil {
		return fmt.Errorf("keep the microVMs that are known: %w", err)
	}
	return nil
}

// run hears the hosts until ctx ends.
func (g *guests) run(ctx context.Context, ready func()) error {
	g.load()
	ready()
	group, ctx := errgroup.WithContext(ctx)
	for _, h := range g.hosts {
		group.Go(func() error { g.follow(ctx, h.Machine); return nil })
	}
	group.Go(func() error { return g.keep(ctx) })
	return group.Wait()
}

// What changes together is written together.
const saveAfter = 200 * time.Millisecond

// keep writes what is known whenever that changes, and at the end.
func (g *guests) keep(ctx context.Context) error {
	write := func() {
		if err := g.save(); err != nil {
			g.log.Error("the next hub will have to ask for microVMs", "err", err)
		}
	}
	defer write()
	for ctx.Err() == nil {
		changed := g.changes()
		write()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		select {
		case <-time.After(saveAfter):
		case <-ctx.Done():
		}
	}
	return nil
}

// How long until a host that is not heard is asked again.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 2 * time.Second
)

// follow hears one host, and comes back to it whenever it was lost.
func (g *guests) follow(ctx context.Context, m Machine) {
	cursor, pause := "", firstPause
	for ctx.Err() == nil {
		err := g.watch(ctx, m, &cursor)
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.OutOfRange && cursor != "" {
			cursor = "" // too late to go on there
			continue
		}
		if g.hear(m.Name, false, err) {
			pause = firstPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, lastPause)
	}
}

// watch takes what a host tells, from a cursor on, which it moves, or from the beginning.
// A connection of its own has the certificates that are there now.
func (g *guests) watch(ctx context.Context, m Machine, cursor *string) error {
	conn, err := g.dial(m)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := ingotv1.NewHostClient(conn).Watch(ctx, &ingotv1.WatchRequest{Resume: *cursor})
	if err != nil {
		return err
	}
	if *cursor != "" { // it may have nothing to say
		g.hear(m.Name, true, nil)
	}
	var current []*guest
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		one := guestOf(m.Name, r.GetMicrovm().GetSpec())
		switch r.GetKind() {
		case ingotv1.WatchResponse_CURRENT:
			current = append(current, one)
			continue // only all of it is what is so
		case ingotv1.WatchResponse_SYNCED:
			g.replace(m.Name, current)
			current = nil
		case ingotv1.WatchResponse_DELETED:
			g.update(m.Name, one.UID, nil)
		default:
			g.update(m.Name, one.UID, one)
		}
		*cursor = r.GetCursor()
		g.hear(m.Name, true, nil)
	}
}

// guestOf is what the hub needs to know of a spec. The metadata interface is the host's
// alone, and the same in each guest.
func guestOf(host string, s *types.MicroVMSpec) *guest {
	g := &guest{UID: s.GetUid(), Namespace: s.GetNamespace(), Name: s.GetId(), Host: host}
	for _, n := range s.GetInterfaces() {
		mac, err := net.ParseMAC(n.GetGuestMac())
		if err != nil || strings.EqualFold(mac.String(), vm.MetadataMAC) {
			continue
		}
		c := card{MAC: mac.String()}
		if p, err := netip.ParsePrefix(n.GetAddress().GetAddress()); err == nil {
			c.Address = p.Addr()
		}
		g.Cards = append(g.Cards, c)
	}
	return g
}

// hear notes whether a host is heard, and says whether that is new.
func (g *guests) hear(host string, heard bool, problem error) bool {
	g.mu.Lock()
	h := g.hosts[host]
	news := h.heard != heard
	if h.heard, h.problem = heard, problem; news {
		h.since = time.Now()
	}
	known := len(h.guests)
	g.mu.Unlock()
	switch {
	case news && heard:
		g.log.Info("a host tells of its microVMs", "host", host, "microvms", known)
	case news:
		g.log.Warn("a host is not heard any more: its microVMs are taken to be as they were", "host", host, "microvms", known, "err", problem)
	}
	return news
}

// replace makes a host's microVMs those of a list.
func (g *guests) replace(host string, current []*guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h := g.hosts[host]
	gone := maps.Clone(h.guests)
	for _, one := range current {
		delete(gone, one.UID)
		g.set(h, one.UID, one)
	}
	for uid := range gone {
		g.set(h, uid, nil)
	}
}

func (g *guests) update(host, uid string, now *guest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(g.hosts[host], uid, now)
}

// set makes what a host has by a uid another one, or none, and says so if it is.
func (g *guests) set(h *hearing, uid string, now *guest) {
	old := h.guests[uid]
	if old == now || old != nil && now != nil && old.equal(now) {
		return
	}
	if old != nil {
		delete(h.guests, uid)
		g.enter(old, index.remove)
	}
	if now != nil {
		h.guests[uid] = now
		g.enter(now, index.add)
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

// enter puts a guest into each index, or takes it out.
func (g *guests) enter(one *guest, do func(index, string, *guest)) {
	do(g.byName, one.String(), one)
	for _, c := range one.Cards {
		do(g.byMAC, c.MAC, one)
		if c.Address.IsValid() {
			do(g.byIP, c.Address.String(), one)
		}
	}
	short := strings.ToLower(one.Name)
	label := short + "." + strings.ToLower(one.Namespace)
	if strings.Contains(label, "..") {
		return // nothing that DNS could say
	}
	do(g.byShort, short, one)
	do(g.byLabel, label, one)
	for _, above, ok := strings.Cut(label, "."); ok; _, above, ok = strings.Cut(above, ".") {
		do(g.byAbove, above, one)
	}
}
