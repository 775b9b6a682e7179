package dhcp

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// export writes the configuration the way isc-dhcp-server has it, for people and
// scripts that look there.
func (s *Server) export() error {
	for path, text := range map[string]string{
		s.c.ConfigFile:   exportConfig(s.c),
		s.c.DefaultsFile: fmt.Sprintf("INTERFACESv4=%q\n", s.c.Interface),
	} {
		if path == "" {
			continue
		}
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		// Nobody reads a part of it, also if this process is killed.
		if err == nil {
			err = os.WriteFile(path+".new", []byte(text), 0o644)
		}
		if err == nil {
			err = os.Rename(path+".new", path)
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}

// exportConfig is the configuration as dhcpd.conf: one that dhcpd would accept.
func exportConfig(c Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, "default-lease-time %d;\nmax-lease-time %d;\n", seconds(c.DefaultLease), seconds(c.MaxLease))
	if c.MinLease != MinLease {
		fmt.Fprintf(&b, "min-lease-time %d;\n", seconds(c.MinLease))
	}
	if c.Authoritative {
		b.WriteString("authoritative;\n")
	}
	declared := map[byte]bool{}
	for _, n := range c.Subnets {
		declare(&b, n.Options, declared)
	}
	for _, n := range c.Subnets {
		exportSubnet(&b, c, n)
	}
	for _, r := range c.Reservations {
		exportHost(&b, r)
	}
	return b.String()
}

func seconds(d time.Duration) int { return int(d / time.Second) }

// declare names the options that dhcpd has no name for.
func declare(b *strings.Builder, o Options, declared map[byte]bool) {
	if len(o.Routes) > 0 && !declared[optionRoutes] {
		b.WriteString("option rfc3442-classless-static-routes code 121 = string;\n")
		declared[optionRoutes] = true
	}
	for _, code := range sortedKeys(o.More) {
		if !declared[code] {
			fmt.Fprintf(b, "option option-%d code %d = string;\n", code, code)
			declared[code] = true
		}
	}
}

func exportSubnet(b *strings.Builder, c Config, n Subnet) {
	fmt.Fprintf(b, "\nsubnet %s netmask %s {\n", n.Prefix.Masked().Addr(), net.IP(net.CIDRMask(n.Prefix.Bits(), 32)))
	for _, s := range []struct {
		name string
		time time.Duration
	}{{"default-lease-time", n.DefaultLease}, {"max-lease-time", n.MaxLease}, {"min-lease-time", n.MinLease}} {
		if s.time != 0 {
			fmt.Fprintf(b, "  %s %d;\n", s.name, seconds(s.time))
		}
	}
	// What is excluded in a range is not of it, for dhcpd.
	if p, err := newPool(c, n); err == nil {
		for _, s := range p.spans {
			fmt.Fprintf(b, "  range %s %s;\n", s.first, s.last)
		}
	}
	exportOptions(b, n.Options)
	b.WriteString("}\n")
}

func exportOptions(b *strings.Builder, o Options) {
	list := func(name string, addrs []netip.Addr) {
		if len(addrs) == 0 {
			return
		}
		words := make([]string, len(addrs))
		for i, a := range addrs {
			words[i] = a.String()
		}
		fmt.Fprintf(b, "  option %s %s;\n", name, strings.Join(words, ", "))
	}
	list("routers", o.Routers)
	list("domain-name-servers", o.DNS)
	if o.Domain != "" {
		fmt.Fprintf(b, "  option domain-name %s;\n", appendQuoted(nil, o.Domain))
	}
	list("ntp-servers", o.NTP)
	if o.MTU != 0 {
		fmt.Fprintf(b, "  option interface-mtu %d;\n", o.MTU)
	}
	if routes, err := o.routes(); err == nil && len(routes) > 0 {
		fmt.Fprintf(b, "  option rfc3442-classless-static-routes %s;\n", hexBytes(routes))
	}
	for _, code := range sortedKeys(o.More) {
		fmt.Fprintf(b, "  option option-%d %s;\n", code, hexBytes(o.More[code]))
	}
}

// hexBytes is dhcpd's other form of a string: 0a:00:01.
func hexBytes(b []byte) string {
	if len(b) == 0 {
		return `""`
	}
	return strings.ReplaceAll(fmt.Sprintf("% x", b), " ", ":")
}

func exportHost(b *strings.Builder, r Reservation) {
	name := r.Name
	if name == "" {
		name = blockName(r)
	}
	fmt.Fprintf(b, "\nhost %s {\n", name)
	switch {
	case len(r.MAC) > 0:
		fmt.Fprintf(b, "  hardware ethernet %s;\n", r.MAC)
	case len(r.ClientID) > 0:
		fmt.Fprintf(b, "  option dhcp-client-identifier %s;\n", hexBytes(r.ClientID))
	case r.MicroVM != "": // dhcpd knows none
		fmt.Fprintf(b, "  set %s = %s;\n", microVMVariable, appendQuoted(nil, r.MicroVM))
	default:
		// A host is known by the name that it gives itself.
		fmt.Fprintf(b, "  host-identifier option host-name %s;\n", appendQuoted(nil, r.Name))
	}
	fmt.Fprintf(b, "  fixed-address %s;\n}\n", r.IP)
}

func sortedKeys(m map[uint8][]byte) []uint8 {
	keys := make([]uint8, 0, len(m))
	for code := range m {
		keys = append(keys, code)
	}
	slices.Sort(keys)
	return keys
}
