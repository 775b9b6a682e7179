package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

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
func (l *Lab) forward(iface string) (changed bool, err error) {
	err = l.withLedger(func(book map[string]*forwarding) error {
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
func (l *Lab) restoreForwarding() error {
	return l.withLedger(func(book map[string]*forwarding) error {
		var problems []error
		for iface, entry := range book {
			entry.Labs = slices.DeleteFunc(entry.Labs, func(n string) bool { return n == l.Name })
			if len(entry.Labs) > 0 {
				continue
			}
			delete(book, iface)
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

func (l *Lab) withLedger(f func(map[string]*forwarding) error) error {
	if err := os.MkdirAll(filepath.Dir(l.ledger()), 0o755); err != nil {
		return err
	}
	lock, err := lockFile(l.ledger()+".lock", true)
	if err != nil {
		return err
	}
	defer lock.Close()
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
		return errors.Join(removeFile(l.ledger()), removeFile(l.ledger()+".lock"))
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

// lockFile takes an exclusive lock that ends with the process or the file.
func lockFile(path string, wait bool) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_EX
	if !wait {
		how |= unix.LOCK_NB
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// FreeSubnet returns want, or another subnet of its size if a route of this
// machine is in its way. Routes through except, the lab's own, are not.
func FreeSubnet(want netip.Prefix, except string) (netip.Prefix, error) {
	routes, err := link.Routes()
	if err != nil {
		return netip.Prefix{}, err
	}
	free := func(p netip.Prefix) bool {
		return !slices.ContainsFunc(routes, func(r link.Route) bool {
			return r.Interface != except && r.Destination.Bits() > 0 && r.Destination.Overlaps(p)
		})
	}
	a := want.Masked().Addr().As4()
	for range 1 << 12 {
		p := netip.PrefixFrom(netip.AddrFrom4(a), want.Bits())
		if free(p) {
			return p, nil
		}
		// The next block, at least a /24 further on.
		if want.Bits() > 24 && want.Bits() <= 32 && a[0] == 100 {
			a[3] += byte(1 << (32 - want.Bits()))
			if a[3] == 0 {
				a[2]++
			}
			continue
		}
		a[2]++
		if a[2] == 0 {
			a[1]++
		}
	}
	return netip.Prefix{}, fmt.Errorf("find a free subnet like %s: this machine's routes cover all of them", want)
}
