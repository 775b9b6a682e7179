package hub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ingot/internal/dhcp"
	"ingot/internal/firewalld"
	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/tailscale"
	"ingot/internal/vpn"
)

// forwardingFile notes what did not forward before there was a hub. A reboot takes it
// with what it is about.
const forwardingFile = "/run/ingot-hub.json"

// firewalld is what the hub asks of its machine's firewalld, if that runs.
func (c Config) firewalld() firewalld.Wants {
	w := firewalld.Wants{Rules: nat.Hub{Inside: c.Interface, Outside: c.Uplink}.Described(), Trusted: []string{c.Interface}}
	if c.Trusted.IsValid() {
		w.Sources = append(w.Sources, c.Trusted)
	}
	if c.VPN != nil {
		w.Trusted = append(w.Trusted, vpnInterface)
		w.Open = append(w.Open, firewalld.Port{Interface: c.Uplink, Number: c.VPN.Port})
	}
	if c.Tailscale != nil {
		w.Trusted = append(w.Trusted, tailscale.Interface)
		w.Open = append(w.Open, firewalld.Port{Interface: c.Uplink, Number: tailscale.Port})
	}
	return w
}

// toldFile has what a hub has given firewalld, which forgets as much at a reboot.
const toldFile = "/run/ingot-hub-firewalld.json"

// keepFirewalld takes back from firewalld what an earlier hub gave it and this one does not
// want, and keeps it told of what this one does.
func (h *Hub) keepFirewalld(ctx context.Context, ready func()) error {
	ready()
	var told firewalld.Wants
	if err := readJSON(toldFile, &told); err != nil {
		return err
	}
	wants := h.c.firewalld()
	stale := told.Without(wants)
	if err := firewalld.Withdraw(ctx, stale); ctx.Err() != nil {
		return nil
	} else if err != nil {
		h.log.Warn("firewalld lets more pass than is wanted", "err", err)
	} else {
		told = told.Without(stale)
	}
	note := func(given firewalld.Wants) error {
		told = told.With(given)
		return replaceJSON(toldFile, told)
	}
	if err := note(firewalld.Wants{}); err != nil {
		return err
	}
	return firewalld.Keep(ctx, wants, note, h.log)
}

// passOthers lets the machine forward, and the segment pass others' chains. It comes
// after the hub's own rules: without them the machine would forward whatever comes.
func (h *Hub) passOthers() error {
	before, err := forwardedBefore()
	if err != nil {
		return err
	}
	forwarding, err := h.c.forwarding()
	if err != nil {
		return err
	}
	if err := putBack(before, forwarding); err != nil {
		return err
	}
	for _, name := range append([]string{everywhere}, forwarding...) {
		if _, noted := before[name]; noted {
			continue
		}
		if before[name], err = nat.Forwarding(name); err != nil {
			return err
		}
	}
	if err := replaceJSON(forwardingFile, before); err != nil {
		return err
	}
	for _, name := range forwarding {
		if _, err := nat.SetForwarding(name, true); err != nil {
			return err
		}
	}
	added, err := nat.SetPassage(h.c.Interface)
	if len(added) > 0 {
		h.log.Info("let the segment pass", "chains", added)
	}
	return err
}

// forwarding are the interfaces by which packets come that the machine is to forward.
// With Tailscale it is all there are, or tailscaled tells everybody that forwarding is
// off: the hub's rules drop what is not said to pass.
func (c Config) forwarding() (names []string, err error) {
	names = []string{c.Interface, c.Uplink}
	if c.Tailscale == nil {
		return names, nil
	}
	all, err := link.List()
	for _, i := range all {
		if i.Name != "lo" && !slices.Contains(names, i.Name) {
			names = append(names, i.Name)
		}
	}
	return names, err
}

// everywhere is what the kernel calls all interfaces there are. The hub notes it, and does
// not set it: that is for others, such as Docker.
const everywhere = "all"

// putBack has interfaces that are not wanted any more forward what they did before there
// was a hub, and takes them out of before.
func putBack(before map[string]bool, wanted []string) error {
	all, err := nat.Forwarding(everywhere)
	if err != nil {
		return err
	}
	theirs := all && !before[everywhere] // somebody wants all to forward since
	var problems []error
	for name, on := range before {
		if name == everywhere || slices.Contains(wanted, name) {
			continue
		}
		if _, err := link.Get(name); err == nil && (on || !theirs) { // else it is gone, with its setting
			if _, err := nat.SetForwarding(name, on); err != nil {
				problems = append(problems, err)
				continue
			}
		}
		delete(before, name)
	}
	return errors.Join(problems...)
}

func forwardedBefore() (map[string]bool, error) {
	before := map[string]bool{}
	err := readJSON(forwardingFile, &before)
	return before, err
}

// Clear takes back what a hub has set on its machine and leaves in force when it ends,
// so that the next one takes it up: rules, forwarding, what firewalld was told. Files
// stay. No hub may run here.
func Clear(ctx context.Context, c Config) error {
	lock, err := dhcp.Lock(ctx, leasesFile)
	if err != nil {
		return fmt.Errorf("a hub runs here, stop it first: %w", err)
	}
	defer lock.Close()
	before, err := forwardedBefore()
	if err != nil {
		return err
	}
	var told firewalld.Wants
	if err := readJSON(toldFile, &told); err != nil {
		return err
	}
	// Forwarding first: what is not forwarded needs no rules.
	problems := []error{putBack(before, nil)}
	problems = append(problems, firewalld.Withdraw(ctx, told.With(c.firewalld())), nat.RemovePassage(c.Interface), nat.Remove(nat.Table), vpn.Forget(vpnDir, vpnInterface))
	if err := errors.Join(problems...); err != nil {
		return err
	}
	return errors.Join(remove(forwardingFile), remove(toldFile))
}

// firewalldTime is how long who asks for facts waits for firewalld.
const firewalldTime = 2 * time.Second

// inTheWay names what the machine's other rules lack for the segment's packets to pass.
func (c Config) inTheWay(ctx context.Context) ([]string, error) {
	w := c.firewalld()
	limited, cancel := context.WithTimeout(ctx, firewalldTime)
	defer cancel()
	missing, err := firewalld.Missing(limited, firewalld.Wants{Rules: w.Rules})
	if limited.Err() != nil && ctx.Err() == nil {
		missing, err = []string{"what firewalld has: it does not answer"}, nil
	}
	obstacles, err2 := nat.Obstacles(c.Interface, c.Uplink)
	for _, o := range obstacles {
		missing = append(missing, "passage through "+o.String())
	}
	return missing, errors.Join(err, err2)
}
