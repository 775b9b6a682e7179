package env

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// VPN is how operators' devices come in; zero: they don't.
type VPN struct {
	Subnet   netip.Prefix // theirs
	Port     uint16       // UDP, on the hub, and in a lab on this machine
	Endpoint string       // where it is reached from outside, HOST or HOST:PORT; empty: this machine's address
}

// On says whether there is one.
func (v VPN) On() bool { return v.Subnet.IsValid() }

func (v VPN) String() string {
	s := fmt.Sprintf("peers in %s, UDP port %d", v.Subnet, v.Port)
	if v.Endpoint != "" {
		s += ", reached at " + v.Endpoint
	}
	return s
}

// What is taken where a file says only that there is to be a VPN.
var usualVPN = netip.MustParsePrefix("10.91.0.0/24")

const usualPort = 51820 // by which WireGuard is known

var validHost = regexp.MustCompile(`^([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$`)

func validEndpoint(text string) bool {
	if len(text) > 255 {
		return false
	}
	host, port, err := net.SplitHostPort(text)
	if err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
	} else {
		host = text
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Zone() == "" && !a.IsUnspecified()
	}
	// What looks like an address, and is none, is no name.
	last := host[strings.LastIndexByte(strings.TrimSuffix(host, "."), '.')+1:]
	return validHost.MatchString(host) && strings.Trim(last, "0123456789.") != ""
}

// endpoint is what peers are told, HOST:PORT; empty if this machine's address is not
// known: then it is the hub's own.
func (v VPN) endpoint(ctx context.Context) string {
	if _, _, err := net.SplitHostPort(v.Endpoint); err == nil {
		return v.Endpoint
	}
	host := v.Endpoint
	if here := outside(ctx); host == "" && here.IsValid() {
		host = here.String()
	}
	if host == "" {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(int(v.Port)))
}

// networks are all that the environment has addresses of.
func (e Env) networks() []netip.Prefix {
	all := []netip.Prefix{e.Subnet, e.Uplink}
	if e.VPN.On() {
		all = append(all, e.VPN.Subnet)
	}
	return all
}

func (d *Declaration) checkVPN(m *mistakes) {
	if d.VPN == nil || !d.VPN.Subnet.IsValid() {
		return
	}
	p := d.VPN.Subnet
	switch {
	case p.Bits() < 16 || p.Bits() > 29:
		m.add("vpn.subnet", "%s has no useful size: from /16 to /29", p)
	case !forMachines(p):
		m.add("vpn.subnet", "%s is not for machines", p)
	case d.Subnet.IsValid() && p.Overlaps(d.Subnet):
		m.add("vpn.subnet", "%s overlaps with subnet %s", p, d.Subnet)
	case d.Uplink.IsValid() && p.Overlaps(d.Uplink):
		m.add("vpn.subnet", "%s overlaps with uplink %s", p, d.Uplink)
	default:
		return
	}
	d.VPN.Subnet = netip.Prefix{}
}

// vpnSubnet is what the file says; zero: nothing.
func (d *Declaration) vpnSubnet() netip.Prefix {
	if d.VPN == nil {
		return netip.Prefix{}
	}
	return d.VPN.Subnet
}

// resolveVPN decides what is left open of a VPN, for an environment that had old.
func (d *Declaration) resolveVPN(e Env, old VPN, free freeSubnet) (VPN, error) {
	v := *d.VPN
	v.Port = cmp.Or(v.Port, old.Port, usualPort)
	v.Subnet = cmp.Or(v.Subnet, old.Subnet)
	if v.Subnet.IsValid() {
		return v, nil
	}
	var err error
	v.Subnet, err = free(usualVPN, append(d.DHCP.relayed(), e.Subnet, e.Uplink)...)
	return v, err
}

// choosePort looks for a port that nobody uses, where neither the file nor an earlier
// one says which.
func (u *up) choosePort() {
	declared := u.Declared != nil && u.Declared.VPN != nil && u.Declared.VPN.Port != 0
	if declared || !u.env.VPN.On() || u.was != nil && u.was.VPN.On() {
		return
	}
	for u.portObjection() != "" && u.env.VPN.Port < 65535 {
		u.env.VPN.Port++
	}
}

// portObjection says who has the VPN's port already; empty: nobody.
func (u *up) portObjection() string {
	port := u.env.VPN.Port
	if i := slices.IndexFunc(u.others, func(e Env) bool { return e.VPN.Port == port }); i >= 0 {
		return fmt.Sprintf("environment %s has UDP port %d", u.others[i].Name, port)
	}
	c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
	if err == nil {
		c.Close()
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Sprintf("something on this machine listens at UDP port %d", port)
	}
	return ""
}
