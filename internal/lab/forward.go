package lab

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"ingot/internal/link"
	"ingot/internal/nat"
)

// forwarding is one interface's setting, shared by the labs of a machine: the
// last one that needs it puts back what was there before the first.
type forwarding struct {
	Before bool     `json:"before"`
	Labs   []string `json:"labs"`
}

// ledger is the file in which the labs of this machine note what they share.
func (l *Lab) ledger() string { return filepath.Join(filepath.Dir(l.RunDir), "forwarding.json") }

// forward switches forwarding on for one interface, and notes it first.
func (l *Lab) forward(ctx context.Context, iface string) (changed bool, err error) {
	err = l.withLedger(ctx, func(book map[string]*forwarding) error {
		on, err := nat.Forwarding(iface)
		if err != nil {
			return err
		}
		entry := book[iface]
		if entry == nil {
			entry = &forwarding{Before: on}
			book[iface] = entry
		}
		if !slices.Contains(entry.Labs, l.Name) {
			entry.Labs = append(entry.Labs, l.Name)
		}
		changed = !on
		return nil
	})
	if err != nil || !changed {
		return false, err
	}
	_, err = nat.SetForwarding(iface, true)
	return true, err
}

// restoreForwarding takes this lab out of the ledger, and puts back what no other
// lab needs.
func (l *Lab) restoreForwarding(ctx context.Context) error {
	// Somebody else may have switched it on for the whole machine since (Docker does):
	// then it is theirs.
	all, err := nat.Forwarding("all")
	if err != nil {
		return err
	}
	return l.withLedger(ctx, func(book map[string]*forwarding) error {
		var problems []error
		for iface, entry := range book {
			entry.Labs = slices.DeleteFunc(entry.Labs, func(n string) bool { return n == l.Name })
			if len(entry.Labs) > 0 {
				continue
			}
			delete(book, iface)
			if all && !entry.Before {
				continue
			}
			if _, err := link.Get(iface); err != nil {
				continue // gone, with its setting
			}
			if _, err := nat.SetForwarding(iface, entry.Before); err != nil {
				problems = append(problems, err)
			}
		}
		return errors.Join(problems...)
	})
}

func (l *Lab) withLedger(ctx context.Context, f func(map[string]*forwarding) error) error {
	if err := os.MkdirAll(filepath.Dir(l.ledger()), 0o755); err != nil {
		return err
	}
	lock, err := Lock(ctx, l.ledger()+".lock", nil)
	if err != nil {
		return err
	}
	defer lock.Release()
	book := map[string]*forwarding{}
	b, err := os.ReadFile(l.ledger())
	if err == nil {
		err = json.Unmarshal(b, &book)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read %s: %w", l.ledger(), err)
	}
	if err := f(book); err != nil {
		return err
	}
	if len(book) == 0 {
		return removeFile(l.ledger())
	}
	b, err = json.Marshal(book)
	if err != nil {
		return err
	}
	return writeFile(l.ledger(), b, 0o600)
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// private are the address ranges in which a free subnet is looked for.
var private = []netip.Prefix{
	netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"),
}

// InTheWay returns the route of this machine that overlaps with a subnet, if there
// is one. Routes through except, the lab's own, don't count.
func InTheWay(p netip.Prefix, except string) (link.Route, bool, error) {
	routes, err := link.Routes()
	if err != nil {
		return link.Route{}, false, err
	}
	r, found := overlapping(routes, p, except)
	return r, found, nil
}

func overlapping(routes []link.Route, p netip.Prefix, except string) (link.Route, bool) {
	i := slices.IndexFunc(routes, func(r link.Route) bool {
		return r.Interface != except && r.Destination.Bits() > 0 && r.Destination.Overlaps(p)
	})
	if i < 0 {
		return link.Route{}, false
	}
	return routes[i], true
}

// FreeSubnet returns want, or another subnet of its size from the same private
// range if a route of this machine or one of taken is in its way. Routes through
// except, the lab's own, are not.
func FreeSubnet(want netip.Prefix, except string, taken ...netip.Prefix) (netip.Prefix, error) {
	routes, err := link.Routes()
	if err != nil {
		return netip.Prefix{}, err
	}
	want = want.Masked()
	within := want
	for _, p := range private {
		if p.Contains(want.Addr()) && p.Bits() <= want.Bits() {
			within = p
		}
	}
	// People tell subnets apart by their third number; nobody looks at those of /30.
	step := uint32(1) << (32 - want.Bits())
	if want.Bits() < 30 {
		step = max(step, 256)
	}
	at := binary.BigEndian.Uint32(want.Addr().AsSlice())
	for range 1 << 12 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, at))), want.Bits())
		if !within.Contains(p.Addr()) { // from its beginning, then
			at = binary.BigEndian.Uint32(within.Addr().AsSlice())
			continue
		}
		_, crossed := overlapping(routes, p, except)
		if !crossed && !slices.ContainsFunc(taken, p.Overlaps) {
			return p, nil
		}
		at += step
	}
	return netip.Prefix{}, fmt.Errorf("find a free subnet like %s: routes and environments of this machine cover all of them", want)
}
