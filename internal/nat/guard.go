package nat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Guard keeps a host's guests to what they may send.
type Guard struct {
	h Host

	mu    sync.Mutex // guards known, and that the tables are as it says
	known known
}

// known is what a guard knows of guests, by device.
type known struct {
	guests map[string]Guest
	leases map[string]lease     // as the kernel has last told
	unheld map[string]time.Time // whose lease is not known yet, and until when that is waited for
}

// lease is what DHCP has given a guest. It can use that until then.
type lease struct {
	address netip.Addr
	until   time.Time
}

// leaseTime is how long a guest that ran already may send from any address that is
// not a machine's, unless DHCP renews its lease before.
const leaseTime = 24 * time.Hour

// OpenGuard sets the host's tables. The guests that an earlier guard has let in
// stay, as far as their devices are there, and so does what DHCP has given them.
func OpenGuard(h Host) (*Guard, error) {
	g := &Guard{h: h, known: known{map[string]Guest{}, map[string]lease{}, map[string]time.Time{}}}
	if err := g.earlierGuests(); err != nil {
		return nil, fmt.Errorf("read earlier guests: %w", err)
	}
	if _, err := g.look(); err != nil {
		return nil, err
	}
	return g, g.set()
}

func (g *Guard) earlierGuests() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	for _, p := range places {
		s := newSets(&nftables.Table{Family: p.family, Name: Table})
		cards, _, err := elements(c, s.guests)
		if err != nil {
			return err
		}
		for _, e := range cards {
			device := keyDevice(e.Key)
			if _, err := link.Get(device); err == nil {
				g.known.guests[device] = Guest{MAC: bytes.Clone(e.Key[unix.IFNAMSIZ : unix.IFNAMSIZ+6])}
			}
		}
		for set, size := range map[*nftables.Set]int{s.allowed: 4, s.allowed6: 16} {
			ranges, _, err := elements(c, set)
			if err != nil {
				return err
			}
			for _, e := range ranges {
				device := keyDevice(e.Key)
				if guest, ok := g.known.guests[device]; ok {
					guest.Allowed = append(guest.Allowed, prefixOf(e.Key[unix.IFNAMSIZ:][:size], e.KeyEnd[unix.IFNAMSIZ:][:size]))
					g.known.guests[device] = guest
				}
			}
		}
	}
	for device, guest := range g.known.guests {
		guest.Allowed = disjoint(guest.Allowed)
		g.known.guests[device] = guest
	}
	return nil
}

// places are where guests are held: those on taps at the bridge, those on macvtaps
// at their devices.
var places = []struct {
	family  nftables.TableFamily
	devices string
}{{nftables.TableFamilyBridge, tap}, {nftables.TableFamilyNetdev, macvtap}}

// Set says who the guest behind a device is; nobody else can send by it. It is
// called before the guest can send. A guest without a MAC address is forgotten,
// which comes before its device is removed.
func (g *Guard) Set(device string, guest Guest) error {
	if g.h.Segment == "" {
		return nil
	}
	running := guest.Running
	guest.Running, guest.Allowed = false, disjoint(guest.Allowed)
	g.mu.Lock()
	defer g.mu.Unlock()
	old, there := g.known.guests[device]
	if guest.MAC == nil && !there || there && bytes.Equal(old.MAC, guest.MAC) && slices.Equal(old.Allowed, guest.Allowed) {
		return nil
	}
	until, waits := g.known.unheld[device]
	if running = running && !there && !waits; running {
		until = time.Now().Add(leaseTime)
	}
	err := error(unix.ENOENT)
	if !strings.HasPrefix(device, macvtap) { // which are rare, and have chains too
		err = exchange(device, old, guest, running)
	}
	rebuild := gone(err) // or somebody changed the sets
	if rebuild {
		_, err = g.look()
	}
	if err == nil {
		g.put(device, guest, until, running)
	}
	if rebuild && err == nil {
		err = g.set()
	}
	if err != nil {
		g.put(device, old, until, false)
		return fmt.Errorf("guard %s: %w", device, err)
	}
	return nil
}

// put writes down who is behind a device. The caller holds g.mu.
func (g *Guard) put(device string, guest Guest, until time.Time, running bool) {
	if running {
		g.known.unheld[device] = until
	}
	if guest.MAC != nil {
		g.known.guests[device] = guest
		return
	}
	delete(g.known.guests, device)
	delete(g.known.leases, device)
	delete(g.known.unheld, device)
}

// exchange changes what the bridge's sets say of a guest, and nothing else.
func exchange(device string, old, guest Guest, running bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	s := newSets(&nftables.Table{Family: nftables.TableFamilyBridge, Name: Table})
	without := func(all, others []nftables.SetElement) (left []nftables.SetElement) {
		for _, e := range all {
			same := func(o nftables.SetElement) bool {
				return bytes.Equal(o.Key, e.Key) && bytes.Equal(o.KeyEnd, e.KeyEnd)
			}
			if !slices.ContainsFunc(others, same) {
				left = append(left, e)
			}
		}
		return left
	}
	for _, set := range s.fixed() {
		was, is := s.of(set, device, old), s.of(set, device, guest)
		if less := without(was, is); len(less) > 0 && err == nil {
			err = c.SetDeleteElements(set, less)
		}
		if more := without(is, was); len(more) > 0 && err == nil {
			err = c.SetAddElements(set, more)
		}
	}
	if running && err == nil {
		err = c.SetAddElements(s.unheld, []nftables.SetElement{{Key: ifname(device), Timeout: leaseTime}})
	}
	if err == nil {
		err = c.Flush()
	}
	return err
}

// set replaces the tables that are not as they should be: with one, what the kernel
// learns meanwhile would be lost. The caller holds g.mu, or is the only one.
func (g *Guard) set() error {
	tables, err := g.h.tables(g.known)
	if err != nil {
		return err
	}
	for family, b := range tables {
		whole, err := inForce(b)
		if err == nil && !whole {
			err = replace(family, b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// inForce says whether a table is as it should be; nil: there is none.
func inForce(b *batch) (bool, error) {
	if b == nil {
		return false, nil
	}
	rules, err := b.check()
	return err == nil && len(missing(rules)) == 0, err
}

func replace(family nftables.TableFamily, b *batch) error {
	if b == nil {
		return remove(family, Table)
	}
	err := b.commit()
	if family == nftables.TableFamilyNetdev && errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("hold macvtap guests (it takes Linux 5.16): %w", err)
	}
	return err
}

// restore sets all tables again if one is not as it should be.
func (g *Guard) restore() (changed bool, all []Refusal, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if all, err = g.look(); err != nil {
		return false, nil, err
	}
	tables, err := g.h.tables(g.known)
	if err != nil {
		return false, nil, err
	}
	for _, b := range tables {
		if whole, err := inForce(b); err != nil {
			return false, nil, err
		} else if b != nil && !whole {
			changed = true
		}
	}
	for family, b := range tables {
		if !changed {
			break
		}
		if err := replace(family, b); err != nil {
			return true, nil, err
		}
	}
	return changed, all, nil
}

// Keep sets the tables again whenever somebody has changed them, until ctx ends:
// `nft flush ruleset` or a firewall's restart must not let guests in. It calls
// restored each time, and refused with what was lately refused whenever it has looked.
func (g *Guard) Keep(ctx context.Context, restored func(), refused func([]Refusal)) error {
	for {
		err := g.keep(ctx, restored, refused)
		if ctx.Err() != nil {
			return nil
		}
		// The kernel drops a listener that can't keep up: look, and listen again.
		if !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

func (g *Guard) keep(ctx context.Context, restored func(), refused func([]Refusal)) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	monitor := nftables.NewMonitor(nftables.WithMonitorAction(nftables.MonitorActionAny), nftables.WithMonitorObject(nftables.MonitorObjectRuleset))
	changes, err := c.AddGenerationalMonitor(monitor)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer func() {
		monitor.Close()
		for range changes { // until its goroutine has heard
		}
	}()
	again := time.NewTicker(lookEach)
	defer again.Stop()
	for {
		changed, all, err := g.restore()
		if err != nil {
			return err
		}
		if changed {
			restored()
		}
		refused(all)
		if err := othersChange(ctx, changes, again.C); err != nil || ctx.Err() != nil {
			return err
		}
	}
}

// othersChange waits until another process has changed something, or it is time, or
// ctx ends. After each change of our own to look at all guests would be much to do
// where many come at once.
func othersChange(ctx context.Context, changes <-chan *nftables.MonitorEvents, again <-chan time.Time) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again:
			return nil
		case change, ok := <-changes:
			if !ok {
				return unix.ENOBUFS
			}
			e := change.GeneratedBy
			if e != nil && e.Error != nil {
				return fmt.Errorf("watch nftables: %w", e.Error)
			}
			if e == nil || !ours(e) {
				return nil
			}
		}
	}
}

// ours says whether this process has made a change: the kernel says which thread.
func ours(e *nftables.MonitorEvent) bool {
	by, known := e.Data.(*nftables.GenMsg)
	if !known {
		return false
	}
	_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", by.ProcPID))
	return err == nil
}
