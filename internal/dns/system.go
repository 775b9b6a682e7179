package dns

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// Port is where a resolver is if nobody says otherwise.
const Port = 53

// ParseUpstream reads a resolver's address, with its port or without one.
func ParseUpstream(text string) (netip.AddrPort, error) {
	at, err := netip.ParseAddrPort(text)
	if ip, bad := netip.ParseAddr(text); bad == nil {
		at, err = netip.AddrPortFrom(ip, Port), nil
	}
	if err != nil || at.Port() == 0 || at.Addr().IsUnspecified() {
		return netip.AddrPort{}, fmt.Errorf("%q is not a resolver's address, nor ADDRESS:PORT", text)
	}
	return at, nil
}

// SystemUpstreams reads the machine's resolvers. Those on loopback can't be
// reached from another network namespace: where systemd-resolved is in charge,
// its own list is read instead.
func SystemUpstreams(files ...string) ([]string, error) {
	if len(files) == 0 {
		files = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}
	}
	var problems []error
	for _, file := range files {
		servers, err := nameservers(file)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if len(servers) > 0 {
			return servers, nil
		}
		problems = append(problems, fmt.Errorf("%s names no resolver beyond this machine's loopback", file))
	}
	return nil, cmp.Or(errors.Join(problems...), errors.New("no resolver found"))
}

func nameservers(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var servers []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		ip, err := netip.ParseAddr(words[1])
		if err == nil && !ip.IsLoopback() && ip.Zone() == "" {
			servers = append(servers, netip.AddrPortFrom(ip, Port).String())
		}
	}
	return servers, nil
}
