package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"ingot/internal/firewalld"
	"ingot/internal/link"
	"ingot/internal/nat"
)

// Ensure makes the lab's machines and the wires between them, as far as they are
// not there. It starts no roles.
func (l *Lab) Ensure(ctx context.Context) (changed bool, err error) {
	for _, step := range []func(context.Context) (bool, error){l.mountRunDir, l.prune, l.ensureMachines, l.wireMachines, l.wireHub, l.openUplink} {
		if err := ctx.Err(); err != nil {
			return changed, context.Cause(ctx)
		}
		did, err := step(ctx)
		changed = changed || did
		if err != nil {
			return changed, fmt.Errorf("make lab %s: %w", l.Name, err)
		}
	}
	return changed, nil
}

// mountRunDir gives the lab file systems of its own for what a reboot may take:
// namespaces can only be pinned where mounts don't propagate, and upper
// directories of overlays can't be below their lower ones.
func (l *Lab) mountRunDir(context.Context) (changed bool, err error) {
	if !mounted(l.RunDir) {
		changed = true
		if err := os.MkdirAll(l.RunDir, 0o700); err != nil {
			return changed, err
		}
		if err := mount("tmpfs", l.RunDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700,size=64m"); err != nil {
			return changed, err
		}
	}
	// Said again: who mounted it may have been killed before this.
	if err := mount("", l.RunDir, "", unix.MS_PRIVATE, ""); err != nil {
		return changed, err
	}
	if mounted(l.scratch()) {
		return changed, nil
	}
	// What machines write where nothing is kept must not fill the file system that
	// the lab's own state is in.
	if err := os.MkdirAll(l.scratch(), 0o700); err != nil {
		return changed, err
	}
	return true, mount("tmpfs", l.scratch(), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700,size=25%")
}

// scratch is where the upper layers of machines' files are: what they write outside
// of their own directories.
func (l *Lab) scratch() string { return filepath.Join(l.RunDir, "scratch") }

// mounted says whether a directory is where a tmpfs of its own begins.
func mounted(dir string) bool {
	var own, parent unix.Stat_t
	return unix.Lstat(dir, &own) == nil && unix.Lstat(filepath.Dir(dir), &parent) == nil && own.Dev != parent.Dev
}

func (l *Lab) ensureMachines(ctx context.Context) (changed bool, err error) {
	for _, m := range l.Machines {
		texts, err := json.Marshal(l.texts(m))
		if err != nil {
			return changed, err
		}
		had, made := l.made(m.Name)
		switch {
		case !made:
			err = l.makeNamespace(m)
		case string(had) != string(texts):
			err = l.rewrite(ctx, m.Name, texts)
		default:
			continue
		}
		if err != nil {
			return changed, err
		}
		changed = true
		// Only now is it whole.
		if err := writeFile(l.madePath(m.Name), texts, 0o600); err != nil {
			return changed, err
		}
	}
	return changed, nil
}

func (l *Lab) madePath(machine string) string { return filepath.Join(l.RunDir, "made", machine) }

// made says whether a machine is there as a whole, and which texts it was given.
func (l *Lab) made(machine string) (texts []byte, ok bool) {
	ns, err := link.OpenNamespace(l.pin(machine))
	if err != nil {
		return nil, false
	}
	ns.Close()
	texts, err = os.ReadFile(l.madePath(machine))
	return texts, err == nil
}

// rewrite gives a machine that is there other texts, when another machine came or
// went. Only from inside can its files be written: they are in an overlay.
func (l *Lab) rewrite(ctx context.Context, machine string, texts []byte) error {
	c := l.Command(ctx, machine, l.Binary, "lab", "write")
	c.Stdin = bytes.NewReader(texts)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("tell %s of the other machines: %w: %s", machine, err, bytes.TrimSpace(out))
	}
	return nil
}

func (l *Lab) hub() Machine {
	for _, m := range l.Machines {
		if m.Hub {
			return m
		}
	}
	return Machine{}
}

// wireMachines joins every machine to the segment's bridge, which lives in the
// hub's namespace, out of reach of this machine's own rules for bridges.
func (l *Lab) wireMachines(context.Context) (changed bool, err error) {
	hub, err := link.OpenNamespace(l.pin(l.hub().Name))
	if err != nil {
		return false, err
	}
	defer hub.Close()
	err = hub.Do(func() error {
		if err := link.Up("lo"); err != nil {
			return err
		}
		if err := unhookBridges(); err != nil {
			return err
		}
		if _, err := link.EnsureBridge("segment"); err != nil {
			return err
		}
		if l.hub().Host {
			return nil // its interface is on the guests' bridge
		}
		did, err := link.EnsureVeth(Segment, "hub0", nil)
		changed = changed || did
		if err != nil {
			return err
		}
		return errors.Join(link.SetMaster("hub0", "segment"), link.Up("hub0"), l.address(Segment, l.hub().Address))
	})
	if err != nil {
		return changed, err
	}
	for _, m := range l.Machines {
		if !m.Host {
			continue
		}
		did, err := l.wireHost(hub, m)
		changed = changed || did
		if err == nil && did {
			err = l.introduce(m)
		}
		if err != nil {
			return changed, fmt.Errorf("wire %s: %w", m.Name, err)
		}
	}
	return changed, nil
}

// introduce has all other machines ask anew who has a new machine's address: they
// may know it as another one's, and would believe that for half a minute.
func (l *Lab) introduce(m Machine) error {
	for _, other := range l.Machines {
		ns, err := link.OpenNamespace(l.pin(other.Name))
		if err != nil {
			return err
		}
		err = ns.Do(func() error { return link.ForgetNeighbour(m.Address) })
		ns.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// wireHost gives a host its bridge for guests, its own interface on it, and a
// wire to the segment.
func (l *Lab) wireHost(hub *link.Namespace, m Machine) (changed bool, err error) {
	host, err := link.OpenNamespace(l.pin(m.Name))
	if err != nil {
		return false, err
	}
	defer host.Close()
	peer := host
	if m.Hub {
		peer = nil
	}
	err = hub.Do(func() error {
		did, err := link.EnsureVeth(port(m.Name), "wire0", peer)
		changed = changed || did
		if err != nil {
			return err
		}
		return errors.Join(link.SetMaster(port(m.Name), "segment"), link.Up(port(m.Name)))
	})
	if err != nil {
		return changed, err
	}
	return changed, host.Do(func() error {
		if err := link.Up("lo"); err != nil {
			return err
		}
		if err := unhookBridges(); err != nil {
			return err
		}
		if _, err := link.EnsureBridge(Bridge); err != nil {
			return err
		}
		did, err := link.EnsureVeth(Segment, Port, nil)
		changed = changed || did
		if err != nil {
			return err
		}
		if err := errors.Join(
			link.SetMaster(Port, Bridge), link.Up(Port),
			link.SetMaster("wire0", Bridge), link.Up("wire0"),
			l.address(Segment, m.Address),
		); err != nil || m.Hub {
			return err
		}
		did, err = link.EnsureRoute(everywhere, l.hub().Address)
		changed = changed || did
		return err
	})
}

// unhookBridges keeps the rules for routed packets away from frames that a bridge
// of this namespace passes on. Where br_netfilter is in the kernel each new
// namespace begins with them, and the hub's chain, which drops what it does not
// know, would cut the segment.
func unhookBridges() error {
	for _, key := range []string{"iptables", "ip6tables", "arptables"} {
		path := "/proc/sys/net/bridge/bridge-nf-call-" + key
		if err := os.WriteFile(path, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("keep routing rules from bridges: %w", err)
		}
	}
	return nil
}

var everywhere = netip.PrefixFrom(netip.IPv4Unspecified(), 0)

func (l *Lab) address(name string, a netip.Addr) error {
	return errors.Join(link.EnsureAddress(name, netip.PrefixFrom(a, l.Subnet.Bits())), link.Up(name))
}

// wireHub joins this machine and the hub, so that this machine reaches the
// segment by a route, and the hub the world through this machine.
func (l *Lab) wireHub(context.Context) (changed bool, err error) {
	hub, err := link.OpenNamespace(l.pin(l.hub().Name))
	if err != nil {
		return false, err
	}
	defer hub.Close()
	changed, err = link.EnsureVeth(l.Device(), Uplink, hub)
	if err != nil {
		return changed, err
	}
	if err := errors.Join(
		link.EnsureAddress(l.Device(), netip.PrefixFrom(l.RootEnd(), l.Uplink.Bits())),
		link.Up(l.Device()),
	); err != nil {
		return changed, err
	}
	err = hub.Do(func() error {
		if err := errors.Join(
			link.EnsureAddress(Uplink, netip.PrefixFrom(l.HubEnd(), l.Uplink.Bits())),
			link.Up(Uplink),
		); err != nil {
			return err
		}
		// This machine reaches the hosts through the hub, whether its roles run or not.
		for _, name := range []string{Segment, Uplink} {
			if _, err := nat.SetForwarding(name, true); err != nil {
				return err
			}
		}
		did, err := link.EnsureRoute(everywhere, l.RootEnd())
		changed = changed || did
		return err
	})
	if err != nil {
		return changed, err
	}
	did, err := link.EnsureRoute(l.Subnet, l.HubEnd())
	return changed || did, err
}

// openUplink lets this machine forward for the lab, on the interfaces that need
// it and no others, and keeps the machine's own network out.
func (l *Lab) openUplink(ctx context.Context) (changed bool, err error) {
	missing, err := nat.CheckLab(l.rules())
	if err != nil {
		return false, err
	}
	if len(missing) > 0 {
		changed = true
		if err := nat.SetLab(l.rules()); err != nil {
			return changed, err
		}
	}
	added, err := nat.SetPassage(l.Device())
	if err != nil {
		return changed, err
	}
	changed = changed || len(added) > 0
	uplinks, err := Uplinks()
	if err != nil {
		return changed, err
	}
	for _, name := range append(uplinks, l.Device()) {
		did, err := l.forward(ctx, name)
		changed = changed || did
		if err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// firewalld is what the lab asks of this machine's firewalld, if that runs: what comes
// from the hub is to pass. What it may reach is for the lab's own table to say.
func (l *Lab) firewalld() firewalld.Wants { return firewalld.Wants{Trusted: []string{l.Device()}} }

// TellFirewalld asks that of it now. The supervisor keeps it so.
func (l *Lab) TellFirewalld(ctx context.Context) error {
	_, err := firewalld.Set(ctx, l.firewalld())
	return err
}

func (l *Lab) rules() nat.Lab {
	return nat.Lab{Table: l.Device(), Uplink: l.Device(), Subnet: l.Uplink, Public: l.VPN, Hub: l.HubEnd()}
}

// MissingRules names what this machine's nftables table for the lab ought to have
// and has not.
func (l *Lab) MissingRules() ([]string, error) { return nat.CheckLab(l.rules()) }

// Uplinks are the interfaces that this machine's default routes use.
func Uplinks() ([]string, error) {
	routes, err := link.Routes()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range routes {
		// One that forbids all has no interface.
		if r.Destination == everywhere && r.Interface != "" && !slices.Contains(names, r.Interface) {
			names = append(names, r.Interface)
		}
	}
	return names, nil
}
