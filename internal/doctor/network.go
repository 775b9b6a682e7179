package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/dhcp"
	"ingot/internal/firewalld"
	"ingot/internal/lab"
	"ingot/internal/link"
	"ingot/internal/nat"
)

// running says whether the environment's way to this machine is there.
func (p Patient) running() bool {
	_, err := link.Get(p.Device)
	return err == nil
}

func lookForwarding(_ context.Context, p Patient) Finding {
	const breaks = "microVMs reach nothing beyond this machine"
	uplinks, err := lab.Uplinks()
	if err != nil {
		return unseen(err)
	}
	if err := unix.Access("/proc/sys/net/ipv4/conf/all/forwarding", unix.W_OK); errors.Is(err, unix.EROFS) {
		return fail("it cannot be switched on: /proc/sys is read-only", breaks, "run this container with --privileged")
	}
	if len(uplinks) == 0 {
		return warn("this machine has no default route", breaks+", and new images cannot be built", "ip route add default via GATEWAY")
	}
	if !p.running() {
		return pass("`ingot up` switches it on for " + strings.Join(uplinks, ", "))
	}
	var off []string
	for _, name := range append(uplinks, p.Device) {
		on, err := nat.Forwarding(name)
		if err != nil {
			return unseen(err)
		}
		if !on {
			off = append(off, name)
		}
	}
	if len(off) == 0 {
		return pass("on for " + strings.Join(append(uplinks, p.Device), ", "))
	}
	return warn("off for "+strings.Join(off, ", "), breaks, "sysctl net.ipv4.conf."+strings.Join(off, ".forwarding=1 net.ipv4.conf.")+".forwarding=1").
		mendedBy(func(context.Context) error {
			var errs []error
			for _, name := range off {
				_, err := nat.SetForwarding(name, true)
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		})
}

// legacyTables is where the kernel lists what iptables-legacy has made.
const legacyTables = "/proc/net/ip_tables_names"

func lookFirewall(ctx context.Context, p Patient) Finding {
	if os.Geteuid() != 0 {
		return skip("only root sees it")
	}
	uplinks, err := lab.Uplinks()
	if err != nil {
		return unseen(err)
	}
	var obstacles []nat.Obstacle
	for _, uplink := range slices.Compact(slices.Sorted(slices.Values(uplinks))) {
		found, err := nat.Obstacles(p.Device, uplink)
		if err != nil {
			return unseen(err)
		}
		for _, o := range found {
			if !slices.Contains(obstacles, o) {
				obstacles = append(obstacles, o)
			}
		}
	}
	rest := ""
	if strings.Contains(read(legacyTables), "filter") {
		rest = "; what iptables-legacy has is not seen (iptables-legacy -S FORWARD)"
	}
	if len(obstacles) == 0 {
		return pass("no chain of others drops forwarded packets" + rest)
	}
	var names []string
	for _, o := range obstacles {
		names = append(names, o.String())
	}
	// What runs has told firewalld already.
	told := !p.running() && firewalld.Running(ctx)
	passed := func(o nat.Obstacle) bool { return o.By == nat.ByPolicy || told && o.Owner == "firewalld" }
	if !p.running() && !slices.ContainsFunc(obstacles, func(o nat.Obstacle) bool { return !passed(o) }) {
		return pass("`ingot up` lets itself pass " + strings.Join(names, ", ") + rest)
	}
	return dropped(p.Device, obstacles, names, rest)
}

// dropped is who drops, and how to get past it: firewalld is told, since it makes
// its chains anew whenever it is reloaded; others' chains get two rules.
func dropped(device string, obstacles []nat.Obstacle, names []string, rest string) Finding {
	var fixes []string
	var others []nat.Obstacle
	asked := false
	for _, o := range obstacles {
		if o.Owner == "firewalld" {
			asked = true
		} else {
			others = append(others, o)
			for _, way := range []string{"iifname", "oifname"} {
				fixes = append(fixes, fmt.Sprintf("nft insert rule %s %s %s %s %s accept", o.Family, o.Table, o.Chain, way, device))
			}
		}
	}
	if asked {
		fixes = append(fixes, "firewall-cmd --zone=trusted --change-interface="+device)
	}
	return warn("forwarded packets are dropped by "+strings.Join(names, ", ")+rest, "microVMs reach nothing beyond this machine", strings.Join(fixes, "; ")).
		mendedBy(func(ctx context.Context) error {
			var errs []error
			if asked {
				_, err := firewalld.Set(ctx, firewalld.Wants{Trusted: []string{device}})
				errs = append(errs, err)
			}
			return errors.Join(append(errs, nat.LetPass(device, others))...)
		})
}

func lookSubnets(_ context.Context, p Patient) Finding {
	var said []string
	for _, n := range p.Networks {
		route, found, err := p.inTheWay(n)
		switch {
		case err != nil:
			return unseen(err)
		case found && p.Exists:
			return warn(fmt.Sprintf("this machine's route to %s by %s overlaps with the environment's %s", route.Destination, route.Interface, n),
				"packets to the environment, or to what was there before it, go to the wrong place",
				fmt.Sprintf("end what made the route (a VPN?), or choose another subnet: `ingot down`, then `subnet` in `ingot up -f FILE` (ip route show %s)", route.Destination))
		case p.Exists:
			said = append(said, n.String()+" is the environment's alone")
		default:
			free, err := lab.FreeSubnet(n, p.Device, p.Taken...)
			if err != nil {
				return fail(err.Error(), "the environment has no addresses", "remove routes (ip route), or name a free `subnet` in `ingot up -f FILE`")
			}
			if free == n {
				said = append(said, n.String()+" is free")
			} else {
				said = append(said, fmt.Sprintf("%s is taken: `ingot up` takes %s", n, free))
			}
		}
	}
	return pass(strings.Join(said, ", "))
}

// inTheWay is a route of others that overlaps with a subnet.
func (p Patient) inTheWay(n netip.Prefix) (link.Route, bool, error) {
	route, found, err := lab.InTheWay(n, p.Device)
	return route, found && !slices.Contains(p.Others, route.Interface), err
}

func lookPorts(_ context.Context, p Patient) Finding {
	if len(p.Machines) == 0 {
		return pass("a lab's machines have their own")
	}
	var taken []string
	for _, m := range p.Machines {
		found, err := m.strangers()
		if err != nil {
			return unseen(err)
		}
		taken = append(taken, found...)
	}
	if len(taken) == 0 {
		return pass("nobody else listens on the roles' ports")
	}
	return fail(strings.Join(taken, ", "), "the role that wants the port does not start", "end that program, in the machine (`ingot machine shell NAME`)")
}

// seekFor is how long a DHCP server has to answer. dhcpd looks for a second whether
// an address is used before it offers that, but answers a question at once.
const seekFor = 1200 * time.Millisecond

func lookDHCP(ctx context.Context, p Patient) Finding {
	if os.Geteuid() != 0 {
		return skip("only root can ask")
	}
	ctx, cancel := context.WithTimeout(ctx, seekFor)
	defer cancel()
	asked := false
	for _, m := range p.Machines {
		if !m.Hub {
			continue
		}
		asked = true
		var found []dhcp.Foreign
		err := m.Inside(func() error {
			var err error
			found, err = dhcp.Seek(ctx, m.Segment, m.Address)
			return err
		})
		if err != nil {
			return unseen(err)
		}
		if len(found) > 0 {
			return foreign(found)
		}
	}
	if !asked {
		return skip("no segment is up")
	}
	return pass("the hub's is the only server on the segment")
}

func foreign(found []dhcp.Foreign) Finding {
	var servers []string
	for _, f := range found {
		s := fmt.Sprintf("%s at %s", f.Server, f.MAC)
		if f.Offers.IsValid() {
			s += fmt.Sprintf(" offers %s", f.Offers)
		}
		servers = append(servers, s)
	}
	return warn("another DHCP server is on the segment: "+strings.Join(servers, ", "), "microVMs get addresses that the hub knows nothing of, or that two have",
		"stop it; `ingot ps -o json` says which microVM has that MAC address, if one has")
}

// lookBridges looks whether bridged frames are shown to the rules for routed
// packets, which drop them. Docker loads the module that does it.
func lookBridges(_ context.Context, p Patient) Finding {
	var hooked []Machine
	for _, m := range p.Machines {
		err := m.Inside(func() error {
			if slices.ContainsFunc(bridgeHooks, func(path string) bool { return number(path) > 0 }) {
				hooked = append(hooked, m)
			}
			return nil
		})
		if err != nil {
			return unseen(err)
		}
	}
	if len(hooked) == 0 {
		return pass("frames between microVMs pass no rules for routed packets")
	}
	var names []string
	for _, m := range hooked {
		names = append(names, m.Name)
	}
	return warn("br_netfilter is on in "+strings.Join(names, ", "), "frames between microVMs on different hosts are dropped",
		"sysctl net.bridge.bridge-nf-call-iptables=0, in those machines").
		mendedBy(func(context.Context) error {
			var errs []error
			for _, m := range hooked {
				errs = append(errs, m.Inside(unhook))
			}
			return errors.Join(errs...)
		})
}

var bridgeHooks = []string{"/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables", "/proc/sys/net/bridge/bridge-nf-call-arptables"}

func unhook() error {
	for _, path := range bridgeHooks {
		if err := os.WriteFile(path, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
