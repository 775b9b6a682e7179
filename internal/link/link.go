// Package link makes and reads network interfaces, addresses, routes and
// network namespaces. It is the only package that speaks rtnetlink. It decides
// nothing: callers say what should be, and calling twice changes nothing.
package link

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Info is one interface.
type Info struct {
	Name      string
	Kind      string // bridge, tuntap, veth, macvtap, device, …
	Master    string // the bridge that it is a port of
	Index     int
	MTU       int
	MAC       net.HardwareAddr
	Up        bool
	Addresses []netip.Prefix
}

// List returns all interfaces of the current network namespace.
func List() ([]Info, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	at := map[int][]netip.Prefix{}
	for _, a := range addrs {
		if p, ok := prefix(a.IPNet); ok {
			at[a.LinkIndex] = append(at[a.LinkIndex], p)
		}
	}
	infos := make([]Info, 0, len(links))
	for _, l := range links {
		i := info(l)
		i.Master = names[l.Attrs().MasterIndex]
		i.Addresses = at[i.Index]
		infos = append(infos, i)
	}
	return infos, nil
}

// Get returns one interface, or errdefs.ErrNotFound.
func Get(name string) (Info, error) {
	l, err := find(name)
	if err != nil {
		return Info{}, err
	}
	i := info(l)
	if m := l.Attrs().MasterIndex; m != 0 {
		if master, err := netlink.LinkByIndex(m); err == nil {
			i.Master = master.Attrs().Name
		}
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, unix.AF_UNSPEC) })
	if err != nil {
		return Info{}, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	for _, a := range addrs {
		if p, ok := prefix(a.IPNet); ok {
			i.Addresses = append(i.Addresses, p)
		}
	}
	return i, nil
}

// EnsureBridge makes a bridge that is up and carries frames, and nothing else: it
// answers no ARP requests for this machine's addresses and has none itself.
func EnsureBridge(name string) (Info, error) {
	l, err := find(name)
	if errdefs.IsNotFound(err) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		// A MAC of its own: otherwise the bridge changes its MAC with its ports.
		attrs.HardwareAddr = MAC(rand.Text())
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
		if err == nil || errors.Is(err, unix.EEXIST) {
			l, err = find(name)
		}
	}
	if err != nil {
		return Info{}, fmt.Errorf("make bridge %s: %w", name, err)
	}
	if l.Type() != "bridge" {
		return Info{}, fmt.Errorf("make bridge %s: a %s has that name: %w", name, l.Type(), errdefs.ErrAlreadyExists)
	}
	if _, err := Sysctl(name, "arp_ignore", "1"); err != nil {
		return Info{}, err
	}
	noIPv6 := fmt.Sprintf("/proc/sys/net/ipv6/conf/%s/disable_ipv6", name)
	if err := os.WriteFile(noIPv6, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return Info{}, fmt.Errorf("disable IPv6 on %s: %w", name, err)
	}
	if err := up(l); err != nil {
		return Info{}, err
	}
	return Get(name)
}

// EnsureVeth makes a pair of joined interfaces: a in the current namespace, b in
// peer (nil: the current one too). A pair that is there is left as it is; an
// end without its peer is made anew.
func EnsureVeth(a, b string, peer *Namespace) (changed bool, err error) {
	here, errHere := find(a)
	there := peerExists(b, peer)
	if errHere == nil && here.Type() == "veth" && there {
		return false, nil
	}
	if errHere == nil {
		if err := netlink.LinkDel(here); err != nil && !gone(err) {
			return false, fmt.Errorf("remove half of veth %s: %w", a, err)
		}
	}
	if there {
		if err := inside(peer, func() error { return Remove(b) }); err != nil {
			return false, err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: b}
	if peer != nil {
		v.PeerNamespace = netlink.NsFd(peer.net.Fd())
	}
	if err := netlink.LinkAdd(v); err != nil {
		return false, fmt.Errorf("make veth %s - %s: %w", a, b, err)
	}
	return true, nil
}

// EnsureWireGuard makes an interface of the kernel's own WireGuard. A kernel without
// it is errdefs.ErrNotImplemented.
func EnsureWireGuard(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("make %s: this kernel has no WireGuard: %w", name, errdefs.ErrNotImplemented)
	case err != nil && !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make %s: %w", name, err)
	}
	l, err := find(name)
	if err == nil && l.Type() != "wireguard" {
		err = fmt.Errorf("make %s: a %s has that name: %w", name, l.Type(), errdefs.ErrAlreadyExists)
	}
	return err
}

func peerExists(name string, ns *Namespace) bool {
	return inside(ns, func() error { _, err := find(name); return err }) == nil
}

func inside(ns *Namespace, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// EnsureAddress gives an interface an IPv4 or IPv6 address, beside those it has.
func EnsureAddress(name string, p netip.Prefix) error {
	l, err := find(name)
	if err != nil {
		return err
	}
	// Without a broadcast address, as `ip address add` leaves it.
	err = netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(p), Broadcast: net.IPv4zero})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("give %s the address %s: %w", name, p, err)
	}
	return nil
}

// SetAddress gives an interface an IPv4 address, in place of those that it has.
func SetAddress(name string, p netip.Prefix) (changed bool, err error) {
	l, err := find(name)
	if err != nil {
		return false, err
	}
	have, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, unix.AF_INET) })
	if err != nil {
		return false, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	there := false
	for _, a := range have {
		if old, ok := prefix(a.IPNet); ok && old == p {
			there = true
			continue
		}
		changed = true
		if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("take the address %s from %s: %w", a.IPNet, name, err)
		}
	}
	if there {
		return changed, nil
	}
	return true, EnsureAddress(name, p)
}

// Up switches an interface on.
func Up(name string) error {
	l, err := find(name)
	if err != nil {
		return err
	}
	return up(l)
}

// SetMaster makes an interface a port of a bridge; an empty name releases it.
func SetMaster(name, bridge string) error {
	l, err := find(name)
	if err != nil {
		return err
	}
	if bridge == "" {
		if err := netlink.LinkSetNoMaster(l); err != nil {
			return fmt.Errorf("release %s: %w", name, err)
		}
		return nil
	}
	b, err := find(bridge)
	if err != nil {
		return err
	}
	if l.Attrs().MasterIndex == b.Attrs().Index {
		return nil
	}
	if err := netlink.LinkSetMaster(l, b); err != nil {
		return fmt.Errorf("join %s to %s: %w", name, bridge, err)
	}
	return nil
}

// Remove deletes an interface. One that is not there is no error.
func Remove(name string) error {
	l, err := find(name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(l); err != nil && !gone(err) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// MAC makes a locally administered address from a seed: the same one each time.
func MAC(seed string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(seed))
	return net.HardwareAddr{2, sum[0], sum[1], sum[2], sum[3], sum[4]}
}

// Sysctl writes one of an interface's IPv4 settings, such as rp_filter, in the
// current network namespace, and returns what it was.
func Sysctl(iface, key, value string) (previous string, err error) {
	// The kernel shows the namespace of the thread that opens it.
	path := fmt.Sprintf("/proc/sys/net/ipv4/conf/%s/%s", iface, key)
	was, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read %s of %s: %w", key, iface, err)
	}
	previous = strings.TrimSpace(string(was))
	if previous == value {
		return previous, nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return "", fmt.Errorf("set %s of %s: %w", key, iface, err)
	}
	return previous, nil
}

// GetSysctl reads what Sysctl sets.
func GetSysctl(iface, key string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/sys/net/ipv4/conf/%s/%s", iface, key))
	if err != nil {
		return "", fmt.Errorf("read %s of %s: %w", key, iface, err)
	}
	return strings.TrimSpace(string(b)), nil
}

func find(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if gone(err) {
		return nil, fmt.Errorf("interface %s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", name, err)
	}
	return l, nil
}

func gone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

func up(l netlink.Link) error {
	if l.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("switch %s on: %w", l.Attrs().Name, err)
	}
	return nil
}

func info(l netlink.Link) Info {
	a := l.Attrs()
	return Info{
		Name: a.Name, Kind: l.Type(), Index: a.Index, MTU: a.MTU,
		MAC: a.HardwareAddr, Up: a.Flags&net.FlagUp != 0,
	}
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
