package link

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tap says how a tap device should be.
type Tap struct {
	Bridge string // empty: it stands alone
	// MAC is the card's behind it. The bridge is told it, and learns no other from
	// what comes by the tap. nil: it learns.
	MAC   net.HardwareAddr
	Owner int // uid that may open it beside root
	MTU   int // 0: the bridge's or the kernel's choice
}

// EnsureTap makes a persistent tap device that is up and where it belongs.
func EnsureTap(name string, t Tap) (Info, error) {
	l, err := find(name)
	if errdefs.IsNotFound(err) {
		if err := makeTap(name, t.Owner); err != nil {
			return Info{}, fmt.Errorf("make tap %s: %w", name, err)
		}
		l, err = find(name)
	}
	if err != nil {
		return Info{}, fmt.Errorf("make tap %s: %w", name, err)
	}
	if l.Type() != "tuntap" {
		return Info{}, fmt.Errorf("make tap %s: a %s has that name: %w", name, l.Type(), errdefs.ErrAlreadyExists)
	}
	if t.MTU != 0 && l.Attrs().MTU != t.MTU {
		if err := netlink.LinkSetMTU(l, t.MTU); err != nil {
			return Info{}, fmt.Errorf("set MTU of %s: %w", name, err)
		}
	}
	if t.Bridge != "" {
		if err := SetMaster(name, t.Bridge); err != nil {
			return Info{}, err
		}
	}
	if t.Bridge != "" && t.MAC != nil {
		if err := pin(l, t.MAC); err != nil {
			return Info{}, fmt.Errorf("tell %s of %s behind %s: %w", t.Bridge, t.MAC, name, err)
		}
	}
	if err := up(l); err != nil {
		return Info{}, err
	}
	return Get(name)
}

// pin has a bridge's port know one MAC address, and learn none. A filter could not
// do that alone: the kernel learns from LLDP before any filter for bridges sees it.
func pin(l netlink.Link, mac net.HardwareAddr) error {
	if err := netlink.LinkSetLearning(l, false); err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP, HardwareAddr: mac,
	})
}

// OpenTap opens a tap device for a hypervisor: with the virtio-net header, as
// QEMU, Firecracker and Cloud Hypervisor expect it.
func OpenTap(name string) (*os.File, error) {
	return openTap(name, -1, false)
}

func makeTap(name string, owner int) error {
	f, err := openTap(name, owner, true)
	if err != nil {
		return err
	}
	return f.Close()
}

func openTap(name string, owner int, persist bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	req, err := unix.NewIfreq(name)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open tap %s: %w", name, err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	if err == nil && persist {
		if owner > 0 {
			err = unix.IoctlSetInt(fd, unix.TUNSETOWNER, owner)
		}
		if err == nil {
			err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open tap %s: %w", name, err)
	}
	return f, nil
}

// EnsureMacvtap makes a macvtap device in bridge mode on parent, with the
// guest's MAC address.
func EnsureMacvtap(name, parent string, mac net.HardwareAddr) (Info, error) {
	p, err := find(parent)
	if err != nil {
		return Info{}, err
	}
	l, err := find(name)
	if err == nil && (l.Type() != "macvtap" || l.Attrs().ParentIndex != p.Attrs().Index) {
		return Info{}, fmt.Errorf("make macvtap %s: a %s has that name: %w", name, l.Type(), errdefs.ErrAlreadyExists)
	}
	if errdefs.IsNotFound(err) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.HardwareAddr = name, p.Attrs().Index, mac
		attrs.MTU, attrs.TxQLen = p.Attrs().MTU, p.Attrs().TxQLen
		err = netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}})
		if err == nil {
			l, err = find(name)
		}
	}
	if err != nil {
		return Info{}, fmt.Errorf("make macvtap %s on %s: %w", name, parent, err)
	}
	if mac != nil && !bytes.Equal(l.Attrs().HardwareAddr, mac) {
		if err := netlink.LinkSetHardwareAddr(l, mac); err != nil {
			return Info{}, fmt.Errorf("set MAC of %s: %w", name, err)
		}
	}
	if err := up(l); err != nil {
		return Info{}, err
	}
	return Get(name)
}

// OpenMacvtap opens a macvtap device for a hypervisor. The node in /dev is named
// after the interface's index, which is not unique across network namespaces, so
// a node of our own is made from what sysfs says of this namespace's, and removed.
func OpenMacvtap(name string) (*os.File, error) {
	matches, err := filepath.Glob(fmt.Sprintf("/sys/class/net/%s/tap*/dev", name))
	if err != nil || len(matches) != 1 {
		return nil, fmt.Errorf("open macvtap %s: no tap in /sys/class/net/%s: %w", name, name, errdefs.ErrNotFound)
	}
	text, err := os.ReadFile(matches[0])
	if err != nil {
		return nil, fmt.Errorf("open macvtap %s: %w", name, err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("open macvtap %s: read %s: %w", name, matches[0], err)
	}
	dir, err := os.MkdirTemp("/dev", ".ingot-")
	if err != nil {
		return nil, fmt.Errorf("open macvtap %s: %w", name, err)
	}
	defer os.RemoveAll(dir)
	node := filepath.Join(dir, "tap")
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return nil, fmt.Errorf("open macvtap %s: make node: %w", name, err)
	}
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open macvtap %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), node)
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open macvtap %s: %w", name, err)
	}
	return f, nil
}

// Metadata prepares a tap for the metadata service: the host answers as
// 169.254.169.254 to a guest that is 169.254.0.1. All guests have that same
// address, each on its own tap, so the kernel must not check where answers
// would go by the first route that it finds: rp_filter is loose there.
func Metadata(tap string) error {
	l, err := find(tap)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{
		IPNet: &net.IPNet{IP: net.IPv4(169, 254, 169, 254), Mask: net.CIDRMask(32, 32)},
		Peer:  &net.IPNet{IP: net.IPv4(169, 254, 0, 1), Mask: net.CIDRMask(32, 32)},
	}
	if err := netlink.AddrAdd(l, addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("give %s the metadata address: %w", tap, err)
	}
	_, err = Sysctl(tap, "rp_filter", "2")
	return err
}
