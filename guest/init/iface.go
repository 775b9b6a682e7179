package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Interfaces are configured with the old ioctls: a netlink library would be half
// of this program.

// iface is a network card.
type iface struct {
	name  string
	mac   string // lower case
	index int
}

// interfaces lists the cards, in the order in which the kernel found them.
func interfaces() ([]iface, error) {
	dirs, err := filepath.Glob("/sys/class/net/*/device")
	if err != nil {
		return nil, err
	}
	var list []iface
	for _, d := range dirs {
		d = filepath.Dir(d)
		mac, err := os.ReadFile(filepath.Join(d, "address"))
		if err != nil {
			return nil, err
		}
		index, err := os.ReadFile(filepath.Join(d, "ifindex"))
		if err != nil {
			return nil, err
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(index)))
		if err != nil {
			return nil, err
		}
		list = append(list, iface{filepath.Base(d), strings.TrimSpace(string(mac)), n})
	}
	slices.SortFunc(list, func(a, b iface) int { return a.index - b.index })
	return list, nil
}

// ifreq is the kernel's: a name, and a union as large as an ifmap.
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [24]byte
}

func newIfreq(name string) *ifreq {
	r := &ifreq{}
	copy(r.name[:unix.IFNAMSIZ-1], name)
	return r
}

// setAddr makes the union a sockaddr_in.
func (r *ifreq) setAddr(a netip.Addr) {
	*(*unix.RawSockaddrInet4)(unsafe.Pointer(&r.data)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.As4()}
}

func ioctl(family int, request uintptr, arg unsafe.Pointer) error {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// rename gives an interface that is down another name.
func rename(from, to string) error {
	r := newIfreq(from)
	copy(r.data[:unix.IFNAMSIZ-1], to)
	if err := ioctl(unix.AF_INET, unix.SIOCSIFNAME, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("rename %s to %s: %w", from, to, err)
	}
	return nil
}

func up(name string) error {
	r := newIfreq(name)
	if err := ioctl(unix.AF_INET, unix.SIOCGIFFLAGS, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("read %s's flags: %w", name, err)
	}
	*(*uint16)(unsafe.Pointer(&r.data)) |= unix.IFF_UP
	if err := ioctl(unix.AF_INET, unix.SIOCSIFFLAGS, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

func setMTU(name string, mtu int) error {
	r := newIfreq(name)
	*(*int32)(unsafe.Pointer(&r.data)) = int32(mtu)
	if err := ioctl(unix.AF_INET, unix.SIOCSIFMTU, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("set %s's MTU to %d: %w", name, mtu, err)
	}
	return nil
}

// setAddress gives the interface an address. An IPv4 address replaces the one
// that the label (eth0, eth0:1) has.
func setAddress(label string, index int, p netip.Prefix) error {
	if p.Addr().Is6() {
		r := struct {
			addr   [16]byte
			prefix uint32
			index  int32
		}{p.Addr().As16(), uint32(p.Bits()), int32(index)}
		if err := ioctl(unix.AF_INET6, unix.SIOCSIFADDR, unsafe.Pointer(&r)); err != nil {
			return fmt.Errorf("give %s %s: %w", label, p, err)
		}
		return nil
	}
	r := newIfreq(label)
	r.setAddr(p.Addr())
	if err := ioctl(unix.AF_INET, unix.SIOCSIFADDR, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("give %s %s: %w", label, p, err)
	}
	r.setAddr(netmask(p.Bits()))
	if err := ioctl(unix.AF_INET, unix.SIOCSIFNETMASK, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("give %s the netmask of %s: %w", label, p, err)
	}
	return nil
}

// clearAddress takes the interface's IPv4 address away.
func clearAddress(name string) error {
	r := newIfreq(name)
	r.setAddr(netip.IPv4Unspecified())
	if err := ioctl(unix.AF_INET, unix.SIOCSIFADDR, unsafe.Pointer(r)); err != nil {
		return fmt.Errorf("take %s's address: %w", name, err)
	}
	return nil
}

func netmask(bits int) netip.Addr {
	m := ^uint32(0) << (32 - bits)
	return netip.AddrFrom4([4]byte{byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)})
}

// rtentry is the kernel's struct of SIOCADDRT, on 64-bit machines.
type rtentry struct {
	_                     uint64
	dst, gateway, genmask unix.RawSockaddrInet4
	flags                 uint16
	_                     int16
	_, _                  uint64
	metric                int16
	dev                   *byte
	_, _                  uint64
	_                     uint16
}

// route is a way to a network. via is 0.0.0.0 if it is on the link.
type route struct {
	to  netip.Prefix
	via netip.Addr
}

// setRoute makes an IPv4 route, or takes it away. That it is so already is no error.
func setRoute(name string, r route, there bool) error {
	dev, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	in := func(a netip.Addr) unix.RawSockaddrInet4 {
		return unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.As4()}
	}
	e := rtentry{dst: in(r.to.Addr()), genmask: in(netmask(r.to.Bits())), gateway: in(r.via), flags: unix.RTF_UP, dev: dev}
	if !r.via.IsUnspecified() {
		e.flags |= unix.RTF_GATEWAY
	}
	request, already := uintptr(unix.SIOCADDRT), unix.EEXIST
	if !there {
		request, already = unix.SIOCDELRT, unix.ESRCH
	}
	if err := ioctl(unix.AF_INET, request, unsafe.Pointer(&e)); err != nil && err != already {
		return fmt.Errorf("route to %s by %s: %w", r.to, r.via, err)
	}
	return nil
}

// setGateway makes the default route. That it is there already is no error.
func setGateway(name string, index int, via netip.Addr) error {
	if via.Is4() {
		return setRoute(name, route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), via}, true)
	}
	r := struct {
		dst, src, gateway [16]byte
		typ               uint32
		dstLen, srcLen    uint16
		metric            uint32
		info              uint64
		flags             uint32
		index             int32
	}{gateway: via.As16(), metric: 1, flags: unix.RTF_UP | unix.RTF_GATEWAY, index: int32(index)}
	if err := ioctl(unix.AF_INET6, unix.SIOCADDRT, unsafe.Pointer(&r)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("route by %s: %w", via, err)
	}
	return nil
}
