package link

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Route is one route of the main table.
type Route struct {
	Destination netip.Prefix // 0.0.0.0/0 is the default route
	Via         netip.Addr
	Interface   string // empty where packets are only refused
}

// Routes lists the IPv4 routes of the main table: one with several ways several times.
func Routes() ([]Route, error) {
	list, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	names := map[int]string{}
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var routes []Route
	for _, r := range list {
		dst := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if p, ok := prefix(r.Dst); ok {
			dst = p
		}
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw}}
		}
		for _, hop := range hops {
			route := Route{Destination: dst, Interface: names[hop.LinkIndex]}
			if via, ok := netip.AddrFromSlice(hop.Gw); ok {
				route.Via = via.Unmap()
			}
			routes = append(routes, route)
		}
	}
	return routes, nil
}

// EnsureRoute sends what goes to dst by way of via, instead of where it went before.
func EnsureRoute(dst netip.Prefix, via netip.Addr) (changed bool, err error) {
	routes, err := Routes()
	if err != nil {
		return false, err
	}
	for _, r := range routes {
		if r.Destination == dst.Masked() && r.Via == via {
			return false, nil
		}
	}
	err = netlink.RouteReplace(&netlink.Route{Dst: ipNet(dst.Masked()), Gw: via.AsSlice()})
	if err != nil {
		return false, fmt.Errorf("route %s via %s: %w", dst, via, err)
	}
	return true, nil
}

// ForgetNeighbour drops what is known of the MAC address behind an IPv4 address, on
// all interfaces. The next packet asks for it anew.
func ForgetNeighbour(a netip.Addr) error {
	known, err := dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, unix.AF_INET) })
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range known {
		if ip, ok := netip.AddrFromSlice(n.IP); !ok || ip.Unmap() != a {
			continue
		}
		if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forget neighbour %s: %w", a, err)
		}
	}
	return nil
}
