package hub

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"ingot/internal/dhcp"
	"ingot/internal/dns"
	"ingot/internal/nat"
	"ingot/internal/vpn"
)

// Numbers are what a hub can be measured by.
type Numbers struct {
	Serving map[string]bool // its parts
	DHCP    dhcp.Facts
	DNS     dns.Facts
	NAT     NATNumbers
	VPN     *vpn.Facts // nil: it has none

	// What DHCP's numbers are of.
	MessageTypes  []string
	LatencyBounds []time.Duration
	LeaseStates   []string
}

// NATNumbers are those of the way out.
type NATNumbers struct {
	Forwarding        bool
	Missing           int // rules
	Connections, Most int // that the kernel tracks, and can; zero: it does not
}

// Numbers measures the hub. What could be measured is there whatever the error is.
func (h *Hub) Numbers(ctx context.Context) (Numbers, error) {
	n := Numbers{
		Serving: map[string]bool{}, DHCP: h.dhcp.Facts(), DNS: h.dns.Facts(),
		MessageTypes: dhcp.MessageTypes[:], LatencyBounds: dhcp.LatencyBounds[:],
		LeaseStates: []string{dhcp.Active, dhcp.Offered, dhcp.Released, dhcp.Expired, dhcp.Declined},
	}
	n.Serving["dhcp"], n.Serving["dns"] = n.DHCP.Serving, n.DNS.Serving
	_, err := h.registry.Facts(ctx)
	n.Serving["registry"] = err == nil
	if h.vpn != nil {
		f := h.vpn.Facts()
		n.VPN, n.Serving["vpn"] = &f, f.Error == nil
	}
	if h.tailnet != nil {
		n.Serving["tailscale"] = h.tailnet.Facts(ctx).Error == nil
	}
	in, err := nat.Forwarding(h.c.Interface)
	out, err2 := nat.Forwarding(h.c.Uplink)
	n.NAT.Forwarding = in && out
	rules, err3 := nat.CheckHub(h.rules(h.access.wanted()))
	for _, r := range rules {
		if !r.Present {
			n.NAT.Missing++
		}
	}
	n.NAT.Connections, err = tracked("count", err)
	n.NAT.Most, err = tracked("max", err)
	return n, errors.Join(err, err2, err3)
}

// tracked is a number of the kernel's connection tracking; it may do without.
func tracked(what string, before error) (int, error) {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + what)
	if errors.Is(err, os.ErrNotExist) {
		return 0, before
	}
	if err != nil {
		return 0, errors.Join(before, fmt.Errorf("read tracked connections: %w", err))
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	return n, errors.Join(before, err)
}
