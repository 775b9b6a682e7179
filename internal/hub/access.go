package hub

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/nat"
)

// access is what a microVM has more than others: ports of the hub's that lead to it, and
// limits of what it may open outside.
type access struct {
	Guest   *guest     `json:"guest"`
	Address netip.Addr `json:"address,omitzero"` // the last that it had
	Ports   []nat.Port `json:"ports,omitempty"`
	Egress  nat.Egress `json:"egress,omitempty"`
}

// accesses keep what microVMs have, in a file, until their hosts say that they are gone,
// and have the hub's rules follow their addresses.
type accesses struct {
	file   string
	guests *guests
	// address is a microVM's now; false: that is not known yet.
	address func(*guest) (netip.Addr, bool)
	leases  <-chan struct{} // has a value when addresses may have changed
	set     func(inForce) error
	cut     func([]nat.Published) error // ends what was let in
	log     *slog.Logger

	// changing is held over the writing, too: one change comes after another.
	changing sync.Mutex
	are      inForce         // what the rules are
	failed   bool            // what is in force is not known
	unsaved  bool            // the file does not have what is in force
	open     []nat.Published // what leads nowhere any more, and is still to be cut

	mu  sync.Mutex // guards all
	all []access   // by uid; who has one may keep it: it does not change
}

// inForce is what the rules have of all of it.
type inForce struct {
	published  []nat.Published
	restricted []nat.Restricted
}

func (x inForce) equal(y inForce) bool {
	return slices.Equal(x.published, y.published) && slices.EqualFunc(x.restricted, y.restricted, func(x, y nat.Restricted) bool {
		return bytes.Equal(x.Card, y.Card) && x.Egress.String() == y.Egress.String()
	})
}

// accessForm is the file.
type accessForm struct {
	Format int      `json:"format"`
	Access []access `json:"access"`
}

// load reads what an earlier hub has kept. Nobody is let in whom it does not mean, and
// nothing is forgotten: what can't be read is an error.
func (a *accesses) load() error {
	b, err := os.ReadFile(a.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read published ports: %w", err)
	}
	var f accessForm
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return fmt.Errorf("read published ports: %s: %w", a.file, err)
	}
	if f.Format != 1 || slices.ContainsFunc(f.Access, func(x access) bool { return x.Guest == nil }) {
		return fmt.Errorf("read published ports: %s: format %d is not known to this version", a.file, f.Format)
	}
	a.all = f.Access
	return nil
}

// save keeps what the next hub is to know.
func (a *accesses) save(all []access) error {
	b, err := json.MarshalIndent(accessForm{1, all}, "", " ")
	if err != nil {
		return err
	}
	return replace(a.file, append(b, '\n'))
}

func (a *accesses) list() []access {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all)
}

// change has f make another list of what there is, which is kept before it is in force.
func (a *accesses) change(f func([]access) ([]access, error)) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	old := a.list()
	all, err := f(slices.Clone(old))
	if err != nil {
		return err
	}
	if !slices.EqualFunc(all, old, access.equal) {
		if err := a.keep(all); err != nil {
			return err
		}
		a.show(all)
	}
	return a.enforce()
}

// catchUp has the rules follow what is so now, also where that can't be kept: an address
// may be somebody else's by now.
func (a *accesses) catchUp() error {
	a.changing.Lock()
	defer a.changing.Unlock()
	old := a.list()
	all := a.refresh(slices.Clone(old))
	var err error
	if a.unsaved || !slices.EqualFunc(all, old, access.equal) {
		err = a.keep(all)
		a.show(all)
	}
	return errors.Join(err, a.enforce())
}

func (a *accesses) keep(all []access) error {
	err := a.save(all)
	if err != nil {
		err = fmt.Errorf("keep published ports: %w", err)
	}
	a.unsaved = err != nil
	return err
}

func (a *accesses) show(all []access) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = all
}

func (x access) equal(y access) bool {
	return x.Guest.UID == y.Guest.UID && x.Guest.Host == y.Guest.Host && x.Guest.equal(y.Guest) && x.Address == y.Address && slices.Equal(x.Ports, y.Ports) && x.Egress.String() == y.Egress.String()
}

// wanted is what the hub's rules ought to have.
func (a *accesses) wanted() inForce {
	var all inForce
	for _, one := range a.list() {
		if one.Address.IsValid() {
			for _, p := range one.Ports {
				all.published = append(all.published, nat.Published{Port: p, Guest: one.Address})
			}
		}
		if len(one.Egress) > 0 {
			for _, c := range one.Guest.Cards {
				if mac := c.hardware(); len(mac) == 6 {
					all.restricted = append(all.restricted, nat.Restricted{Card: mac, Egress: one.Egress})
				}
			}
		}
	}
	return all
}

// enforce sets the rules, if they are others than before.
func (a *accesses) enforce() error {
	want := a.wanted()
	if a.failed || !want.equal(a.are) {
		before := a.are.published
		a.failed = true
		if err := a.set(want); err != nil {
			return err
		}
		a.failed, a.are = false, want
		a.open = append(a.open, before...)
	}
	a.open = slices.DeleteFunc(a.open, func(p nat.Published) bool { return slices.Contains(want.published, p) })
	if len(a.open) == 0 {
		return nil
	}
	if err := a.cut(a.open); err != nil {
		return err
	}
	a.open = nil
	return nil
}

// follow has the rules follow what changes, until ctx ends.
func (a *accesses) follow(ctx context.Context, ready func()) error {
	ready()
	for {
		changed := a.guests.changes()
		if err := a.catchUp(); err != nil {
			a.log.Error("the rules of microVMs are not as they should be", "err", err)
		}
		if !wait(ctx, together, nil, nil) || !wait(ctx, sweep, changed, a.leases) {
			return nil
		}
	}
}

const (
	together = 10 * time.Millisecond // what changes in this time is done together
	sweep    = 10 * time.Second      // until then it is noticed that a silent host is heard
)

// wait is for one of two events or some time; false: ctx ended.
func wait(ctx context.Context, d time.Duration, a, b <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-a:
	case <-b:
	case <-timer.C:
	case <-ctx.Done():
		return false
	}
	return true
}

// refresh takes in what is known of microVMs now.
func (a *accesses) refresh(all []access) []access {
	if len(all) == 0 {
		return nil
	}
	// In this order: of a host that is heard all are known.
	hosts := a.guests.facts()
	known := map[string]*guest{}
	for _, g := range a.guests.all() {
		known[g.UID] = g
	}
	var kept []access
	for _, one := range all {
		g := known[one.Guest.UID]
		silent := slices.ContainsFunc(hosts, func(h hearingFacts) bool { return h.Host == one.Guest.Host && !h.Heard })
		if g == nil && !silent {
			a.log.Info("a microVM is gone, and what it had with it", "vm", one.Guest.String(), "uid", one.Guest.UID)
			continue
		}
		if g != nil {
			one.Guest = g
		}
		if ip, ok := a.address(one.Guest); ok {
			one.Address = ip
		}
		kept = append(kept, one)
	}
	return kept
}

// How long a microVM may take to be heard of.
const guestPatience = 5 * time.Second

// guest is a microVM, which may be so new that its host has not told of it yet.
func (a *accesses) guest(ctx context.Context, uid string) (*guest, error) {
	ctx, cancel := context.WithTimeout(ctx, guestPatience)
	defer cancel()
	for {
		changed := a.guests.changes()
		all := a.guests.all()
		if i := slices.IndexFunc(all, func(g *guest) bool { return g.UID == uid }); i >= 0 {
			return all[i], nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("find microVM %s: no host has told the hub of it: %w", uid, errdefs.ErrNotFound)
		}
	}
}

// publish leads ports to a microVM, beside those that it has or in their place.
func (a *accesses) publish(ctx context.Context, uid string, ports []nat.Port, replace bool) error {
	g, err := a.guest(ctx, uid)
	if err != nil {
		return err
	}
	return a.grant(g, func(one *access) {
		one.Ports = slices.Clone(one.Ports)
		if replace {
			one.Ports = nil
		}
		for _, p := range ports {
			if !slices.Contains(one.Ports, p) {
				one.Ports = append(one.Ports, p)
			}
		}
	})
}

// restrict says what a microVM may open outside.
func (a *accesses) restrict(ctx context.Context, uid string, e nat.Egress) error {
	g, err := a.guest(ctx, uid)
	if err != nil {
		return err
	}
	return a.grant(g, func(one *access) { one.Egress = e })
}

// grant changes what a microVM has.
func (a *accesses) grant(g *guest, f func(*access)) error {
	return a.change(func(all []access) ([]access, error) {
		all = a.refresh(all) // who is gone has no port any more
		i := slices.IndexFunc(all, func(x access) bool { return x.Guest.UID == g.UID })
		if i < 0 {
			i = len(all)
			all = append(all, access{Guest: g})
		}
		if ip, ok := a.address(g); ok {
			all[i].Address = ip
		}
		f(&all[i])
		return tidy(all), collisions(all)
	})
}

// tidy leaves out who has nothing.
func tidy(all []access) []access {
	all = slices.DeleteFunc(all, func(x access) bool { return len(x.Ports)+len(x.Egress) == 0 })
	slices.SortFunc(all, func(x, y access) int { return cmp.Compare(x.Guest.UID, y.Guest.UID) })
	return all
}

// collisions says which ports two have.
func collisions(all []access) error {
	type owned struct {
		nat.Port
		guest *guest
	}
	seen := map[string][]owned{}
	for _, one := range all {
		for _, p := range one.Ports {
			key := fmt.Sprintf("%s %d", p.Protocol, p.Port)
			for _, other := range seen[key] {
				if p.Collides(other.Port) {
					return fmt.Errorf("publish %s: %s is published for %s: %w", p, other.Port, other.guest, errdefs.ErrAlreadyExists)
				}
			}
			seen[key] = append(seen[key], owned{p, one.Guest})
		}
	}
	return nil
}

// unpublish takes ports of a microVM away, or all. Where they lead does not matter if it
// is not said.
func (a *accesses) unpublish(uid string, ports []nat.Port) error {
	return a.change(func(all []access) ([]access, error) {
		i := slices.IndexFunc(all, func(x access) bool { return x.Guest.UID == uid })
		if i < 0 {
			return nil, fmt.Errorf("unpublish: microVM %s has no published port: %w", uid, errdefs.ErrNotFound)
		}
		left := slices.Clone(all[i].Ports)
		for _, p := range ports {
			at := slices.IndexFunc(left, func(x nat.Port) bool {
				return x.Protocol == p.Protocol && x.Address == p.Address && x.Port == p.Port && (p.To == 0 || p.To == x.To)
			})
			if at < 0 {
				return nil, fmt.Errorf("unpublish %s/%s: %s has no such port: %w", p.Outside(), p.Protocol, all[i].Guest, errdefs.ErrNotFound)
			}
			left = slices.Delete(left, at, at+1)
		}
		if len(ports) == 0 {
			left = nil
		}
		all[i].Ports = left
		return tidy(all), nil
	})
}
