package env

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"ingot/internal/lab"
)

// check decides what the environment is to be, and finds all that speaks against
// it. Nothing has been changed so far. A dry run with objections shows the plan as
// well.
func (u *up) check(ctx context.Context) (string, error) {
	o := u.missing
	if u.blind {
		return "", o
	}
	if err := u.decide(); err != nil {
		var more Objections
		if !errors.As(err, &more) && o == nil {
			return "", err
		}
		return "", append(o, more...)
	}
	u.lab = u.env.Lab(u.Binary)
	o = append(o, u.collisions()...)
	o = append(o, u.tailscaleObjections()...)
	o = append(o, u.lost()...)
	o = append(o, u.vmPlan().objections(u.Force)...)
	if len(o) > 0 && u.DryRun { // what would be done without them is worth knowing
		if _, err := u.showPlan(ctx); err != nil {
			return "", err
		}
	}
	return "nothing speaks against it", o.err()
}

func (u *up) decide() error {
	if u.Declared == nil && u.was != nil {
		u.env = *u.was
		return nil
	}
	d := u.Declared
	if d == nil {
		d = &Declaration{Machines: usualMachines()}
	}
	var taken []netip.Prefix
	for _, other := range u.others {
		taken = append(taken, other.networks()...)
	}
	var err error
	u.env, err = d.resolve(u.name, u.was, func(want netip.Prefix, avoid ...netip.Prefix) (netip.Prefix, error) {
		not := append(slices.Clone(taken), avoid...)
		device := Env{Name: u.name}.Lab(u.Binary).Device()
		got, err := lab.FreeSubnet(want, device, not...)
		if err == nil && got != want {
			u.say("note: %s is used instead of %s, which %s", got, want, u.taken(want, device))
		}
		return got, err
	})
	u.choosePort()
	return err
}

// taken says who has a subnet.
func (u *up) taken(p netip.Prefix, device string) string {
	for _, other := range u.others {
		if slices.ContainsFunc(other.networks(), p.Overlaps) {
			return "environment " + other.Name + " has"
		}
	}
	if r, found, err := lab.InTheWay(p, device); err == nil && found {
		return fmt.Sprintf("overlaps with this machine's route to %s by %s", r.Destination, cmp.Or(r.Interface, "nobody"))
	}
	return "overlaps with what the file says"
}

// collisions are with other environments and with routes of this machine.
func (u *up) collisions() Objections {
	var o Objections
	where := source{}
	if u.Declared != nil {
		where = u.Declared.source
	}
	for _, other := range u.others {
		if other.Lab(u.Binary).Device() == u.lab.Device() {
			o = append(o, refuse(errdefs.ErrAlreadyExists, "environment %s has the interface %s already: choose another name", other.Name, u.lab.Device()))
		}
	}
	var was Env
	if u.was != nil {
		was = *u.was
	}
	if u.env.VPN.On() && u.env.VPN.Port != was.VPN.Port {
		if who := u.portObjection(); who != "" {
			o = append(o, where.mistake("vpn.port", "%s already", who))
		}
	}
	for _, net := range []struct {
		key    string
		p, was netip.Prefix
	}{{"subnet", u.env.Subnet, was.Subnet}, {"uplink", u.env.Uplink, was.Uplink}, {"vpn.subnet", u.env.VPN.Subnet, was.VPN.Subnet}} {
		if net.p == net.was {
			continue
		}
		for _, other := range u.others {
			if i := slices.IndexFunc(other.networks(), net.p.Overlaps); i >= 0 {
				o = append(o, where.mistake(net.key, "%s overlaps with environment %s, which has %s", net.p, other.Name, other.networks()[i]))
			}
		}
		if r, found, err := lab.InTheWay(net.p, u.lab.Device()); err != nil {
			o = append(o, err)
		} else if found && !slices.ContainsFunc(u.others, func(e Env) bool { return r.Interface == e.Lab(u.Binary).Device() }) {
			o = append(o, where.mistake(net.key, "%s overlaps with this machine's route to %s by %s", net.p, r.Destination, r.Interface))
		}
	}
	return o
}

// lost are the microVMs on machines that the file no longer has, but for those that
// it no longer declares either.
func (u *up) lost() Objections {
	var o Objections
	if u.was == nil || u.Force {
		return nil
	}
	for _, m := range u.was.Machines {
		if slices.ContainsFunc(u.env.Machines, func(n Machine) bool { return n.Name == m.Name }) {
			continue
		}
		var names []string
		for _, name := range vmsOnDisk(u.was.filesOf(m)) {
			is := func(v MicroVM) bool { return v.String() == name }
			if !slices.ContainsFunc(u.was.MicroVMs, is) || slices.ContainsFunc(u.env.MicroVMs, is) {
				names = append(names, name)
			}
		}
		if len(names) > 0 {
			o = append(o, refuse(errdefs.ErrFailedPrecondition,
				"machine %s can't go while it has %s: `ingot rm` them, or lose them with `ingot up --force`", m.Name, strings.Join(names, ", ")))
		}
	}
	return o
}

// vmsOnDisk are the microVMs that a machine has records of, whether it runs or not.
func vmsOnDisk(files string) []string {
	var names []string
	for _, path := range records(files) {
		parts := strings.Split(filepath.Dir(path), string(filepath.Separator))
		names = append(names, parts[len(parts)-3]+"/"+parts[len(parts)-2])
	}
	return names
}

// vmPlan is what the microVMs that are there now have to become.
func (u *up) vmPlan() vmPlan {
	var stay []placed
	for _, h := range u.have {
		if slices.ContainsFunc(u.env.Hosts(), func(m Machine) bool { return m.Name == h.host }) {
			stay = append(stay, h)
		}
	}
	return planMicroVMs(u.env.MicroVMs, stay)
}
