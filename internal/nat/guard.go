package nat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Guard keeps a host's guests to what they may send.
type Guard struct {
	h Host

	mu     sync.Mutex // guards guests, and that the tables are as they say
	guests guests
}

// OpenGuard sets the host's tables. The guests that an earlier guard has let in
// stay, as far as their devices are there.
func OpenGuard(h Host) (*Guard, error) {
	known, err := earlierGuests()
	if err != nil {
		return nil, err
	}
	g := &Guard{h: h, guests: known}
	return g, g.set()
}

func earlierGuests() (guests, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	known := guests{}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyBridge, nftables.TableFamilyNetdev} {
		cards, err := keys(c, &nftables.Table{Family: family, Name: Table}, "guests")
		if err != nil {
			return nil, fmt.Errorf("read earlier guests: %w", err)
		}
		for _, key := range cards {
			device, _, _ := bytes.Cut(key[:unix.IFNAMSIZ], []byte{0})
			if _, err := link.Get(string(device)); err == nil {
				known[string(device)] = bytes.Clone(key[unix.IFNAMSIZ : unix.IFNAMSIZ+6])
			}
		}
	}
	return known, nil
}

// Set says which MAC address the guest behind a device has; from a tap, nothing
// else passes. It is called before the guest can send. Without an address the
// guest is forgotten, which comes before its device is removed.
func (g *Guard) Set(device string, mac net.HardwareAddr) error {
	if g.h.Segment == "" {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	old, known := g.guests[device]
	if mac == nil {
		delete(g.guests, device)
	} else {
		g.guests[device] = mac
	}
	var err error
	switch {
	case mac == nil && !known:
		return nil
	case strings.HasPrefix(device, macvtap): // rare: it has a chain too
		err = g.set()
	case bytes.Equal(old, mac):
		return nil
	default:
		if err = exchange(device, old, mac); gone(err) { // somebody changed the set
			err = g.set()
		}
	}
	if err != nil {
		if known {
			g.guests[device] = old
		} else {
			delete(g.guests, device)
		}
		return fmt.Errorf("guard %s: %w", device, err)
	}
	return nil
}

// exchange replaces one element of the bridge's set, and nothing else.
func exchange(device string, old, mac net.HardwareAddr) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	set := guestSet(&nftables.Table{Family: nftables.TableFamilyBridge, Name: Table})
	if old != nil {
		err = c.SetDeleteElements(set, []nftables.SetElement{{Key: cardKey(device, old)}})
	}
	if mac != nil && err == nil {
		err = c.SetAddElements(set, []nftables.SetElement{{Key: cardKey(device, mac)}})
	}
	if err == nil {
		err = c.Flush()
	}
	return err
}

// set replaces all tables. The caller holds g.mu, or is the only one.
func (g *Guard) set() error {
	tables, err := g.h.tables(g.guests)
	if err != nil {
		return err
	}
	for family, b := range tables {
		if b != nil {
			err = b.commit()
		} else {
			err = remove(family, Table)
		}
		if family == nftables.TableFamilyNetdev && errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("hold macvtap guests (it takes Linux 5.16): %w", err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// restore sets the tables again if they are not as they should be.
func (g *Guard) restore() (changed bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	tables, err := g.h.tables(g.guests)
	if err != nil {
		return false, err
	}
	for _, b := range tables {
		if b == nil {
			continue
		}
		rules, err := b.check()
		if err != nil {
			return false, err
		}
		changed = changed || len(missing(rules)) > 0
	}
	if !changed {
		return false, nil
	}
	return true, g.set()
}

// Keep sets the tables again whenever somebody has changed them, until ctx ends:
// `nft flush ruleset` or a firewall's restart must not let guests in. It calls
// restored each time.
func (g *Guard) Keep(ctx context.Context, restored func()) error {
	for {
		err := g.keep(ctx, restored)
		if ctx.Err() != nil {
			return nil
		}
		// The kernel drops a listener that can't keep up: look, and listen again.
		if !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

func (g *Guard) keep(ctx context.Context, restored func()) error {
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
	for {
		changed, err := g.restore()
		if err != nil {
			return err
		}
		if changed {
			restored()
		}
		select {
		case <-ctx.Done():
			return nil
		case change, ok := <-changes:
			if !ok {
				return unix.ENOBUFS
			}
			if e := change.GeneratedBy; e != nil && e.Error != nil {
				return fmt.Errorf("watch nftables: %w", e.Error)
			}
		}
	}
}
