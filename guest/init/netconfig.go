package main

import (
	"net/netip"
	"strings"
)

// nic is how one interface is to be.
type nic struct {
	name        string
	mac         string // lower case; empty: found by name
	addresses   []netip.Prefix
	gateways    []netip.Addr
	nameservers []netip.Addr
	dhcp        bool
}

// metadataMAC is the card that reaches the metadata service, on every microVM.
const metadataMAC = "aa:ff:00:00:00:01"

// defaultNICs are those of a microVM without a network configuration: the
// metadata card has its fixed address, and one other asks for one.
func defaultNICs(segment string) []nic {
	return []nic{
		{name: "eth0", mac: metadataMAC, addresses: []netip.Prefix{netip.MustParsePrefix("169.254.0.1/16")}},
		{name: segment, dhcp: true},
	}
}

// parseNetwork reads the network configuration as flintlock writes it: a part
// of netplan's version 2, in block style. What it does not know it skips.
func parseNetwork(text string) []nic {
	var nics []nic
	var path []string // the keys above the line, by depth
	var depth []int
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		if trimmed == "" || trimmed[0] == '#' {
			continue
		}
		indent := len(line) - len(strings.TrimLeft(line, " "))
		item, isItem := strings.CutPrefix(trimmed, "- ")
		// A list's items may stand as deep as their key.
		for len(depth) > 0 && (indent < depth[len(depth)-1] || indent == depth[len(depth)-1] && !isItem) {
			depth, path = depth[:len(depth)-1], path[:len(path)-1]
		}
		key, value := "", item
		if !isItem {
			var ok bool
			if key, value, ok = strings.Cut(trimmed, ":"); !ok {
				continue
			}
			path, depth = append(path, unquote(key)), append(depth, indent)
		}
		if len(path) < 2 || path[0] != "ethernets" {
			continue
		}
		if len(path) == 2 && !isItem {
			nics = append(nics, nic{name: path[1]})
			continue
		}
		if len(nics) > 0 {
			nics[len(nics)-1].set(strings.Join(path[2:], "."), unquote(value))
		}
	}
	return nics
}

func (n *nic) set(key, value string) {
	switch key {
	case "match.macaddress":
		n.mac = strings.ToLower(value)
	case "match.name":
		n.name = value
	case "dhcp4":
		n.dhcp = value == "true" || value == "yes"
	case "addresses":
		if p, err := netip.ParsePrefix(value); err == nil {
			n.addresses = append(n.addresses, p)
		}
	case "gateway4", "gateway6":
		if a, err := netip.ParseAddr(value); err == nil {
			n.gateways = append(n.gateways, a)
		}
	case "nameservers.addresses":
		if a, err := netip.ParseAddr(value); err == nil {
			n.nameservers = append(n.nameservers, a)
		}
	}
}

func unquote(s string) string {
	s = strings.TrimSpace(s)
	if len(s) >= 2 && (s[0] == '"' || s[0] == '\'') && s[len(s)-1] == s[0] {
		return s[1 : len(s)-1]
	}
	return s
}
