package env

import (
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"ingot/internal/hub"
	"ingot/internal/vm"
)

// DHCP is what the hub gives on the segment and behind relays, and for whom it keeps
// addresses. Its Ranges are all of the segment's.
type DHCP struct {
	hub.DHCP
	Reservations []hub.Reservation
}

// dhcpForm is how a kept file has it.
type dhcpForm struct {
	First        string `yaml:"first,omitempty"`
	Last         string `yaml:"last,omitempty"`
	hub.DHCP     `yaml:",inline"`
	Reservations []reservationForm `yaml:"reservations,omitempty"`
}

type reservationForm struct {
	Address  netip.Addr `yaml:"address"`
	MAC      string     `yaml:"mac,omitempty"`
	ClientID string     `yaml:"client_id,omitempty"`
	MicroVM  string     `yaml:"microvm,omitempty"`
}

func (d DHCP) form() dhcpForm {
	f := dhcpForm{DHCP: d.DHCP}
	if len(d.Ranges) == 1 {
		f.First, f.Last, f.Ranges = d.Ranges[0].First.String(), d.Ranges[0].Last.String(), nil
	}
	for _, r := range d.Reservations {
		f.Reservations = append(f.Reservations, reservationForm{r.Address, r.MAC, r.ClientID, r.MicroVM})
	}
	return f
}

// mostItems bounds lists whose items are compared with each other.
const mostItems = 256

// dhcp reads what is said of DHCP.
func (r *reader) dhcp(n *yaml.Node, key string, d *DHCP) {
	r.network(n, key, &d.Network, fields{
		"reservations": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) { d.Reservations = append(d.Reservations, r.reservation(n, key)) })
		},
		"subnets": func(n *yaml.Node, key string) {
			r.few(n, key, func(n *yaml.Node, key string) {
				var s hub.Subnet
				r.network(n, key, &s.Network, fields{"subnet": func(n *yaml.Node, key string) { s.Prefix = r.prefix(n, key) }})
				d.Subnets = append(d.Subnets, s)
			})
		},
	})
}

// network reads what is said of one network, and more that may stand beside it.
func (r *reader) network(n *yaml.Node, key string, w *hub.Network, more fields) {
	var only hub.Range
	known := fields{
		"ranges": func(n *yaml.Node, key string) {
			r.few(n, key, func(n *yaml.Node, key string) {
				var one hub.Range
				r.mapping(n, key, r.rangeFields(&one))
				w.Ranges = append(w.Ranges, one)
			})
		},
		"exclude": func(n *yaml.Node, key string) {
			r.few(n, key, func(n *yaml.Node, key string) {
				if text := r.text(n, key); strings.Contains(text, "/") {
					w.Exclude = append(w.Exclude, r.prefix(n, key))
				} else {
					a := r.address(n, key)
					w.Exclude = append(w.Exclude, netip.PrefixFrom(a, a.BitLen()))
				}
			})
		},
		"lease": func(n *yaml.Node, key string) {
			at := func(to *time.Duration) func(*yaml.Node, string) {
				return func(n *yaml.Node, key string) { *to = r.seconds(n, key) }
			}
			r.mapping(n, key, fields{"default": at(&w.Lease.Default), "min": at(&w.Lease.Min), "max": at(&w.Lease.Max)})
		},
		"routers": r.addresses(&w.Routers), "dns": r.addresses(&w.DNS), "ntp": r.addresses(&w.NTP),
		"domain": func(n *yaml.Node, key string) {
			if w.Domain = r.text(n, key); w.Domain != "" && !hub.ValidDomain(w.Domain) {
				r.add(key, "%q is not a domain, such as lab.internal", w.Domain)
			}
		},
		"mtu": func(n *yaml.Node, key string) {
			if v, ok := r.number(n, key); ok && (v < smallestMTU || v > math.MaxUint16) {
				r.add(key, "%d is not from %d, IPv4's smallest, to %d", v, smallestMTU, math.MaxUint16)
			} else if ok {
				w.MTU = uint16(v)
			}
		},
		"routes": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) {
				var one hub.Route
				r.mapping(n, key, fields{
					"to":  func(n *yaml.Node, key string) { one.To = r.prefix(n, key) },
					"via": func(n *yaml.Node, key string) { one.Via = r.address(n, key) },
				})
				w.Routes = append(w.Routes, one)
			})
		},
		"options": func(n *yaml.Node, key string) {
			r.list(n, key, func(n *yaml.Node, key string) { w.Options = append(w.Options, r.option(n, key)) })
		},
	}
	maps.Copy(known, r.rangeFields(&only))
	maps.Copy(known, more)
	r.mapping(n, key, known)
	switch one := r.has(key+".first") || r.has(key+".last"); {
	case one && r.has(key+".ranges"):
		r.add(key+".ranges", "first and last are a range already: make them one of these")
	case one:
		w.Ranges = []hub.Range{only}
	}
}

// smallestMTU is IPv4's (RFC 2132, section 5.1).
const smallestMTU = 68

func (r *reader) rangeFields(to *hub.Range) fields {
	return fields{
		"first": func(n *yaml.Node, key string) { to.First = r.address(n, key) },
		"last":  func(n *yaml.Node, key string) { to.Last = r.address(n, key) },
	}
}

// few reads a list that has items, but not too many.
func (r *reader) few(n *yaml.Node, key string, read func(n *yaml.Node, key string)) {
	switch {
	case n.Kind == yaml.SequenceNode && len(n.Content) == 0:
		r.add(key, "it is empty: left out, it is as usual")
	case n.Kind == yaml.SequenceNode && len(n.Content) > mostItems:
		r.add(key, "there are %d, and %d are the most", len(n.Content), mostItems)
	default:
		r.list(n, key, read)
	}
}

func (r *reader) addresses(to *[]netip.Addr) func(*yaml.Node, string) {
	return func(n *yaml.Node, key string) {
		r.few(n, key, func(n *yaml.Node, key string) {
			a := r.address(n, key)
			if a.IsValid() && !forMachines(netip.PrefixFrom(a, a.BitLen())) {
				r.add(key, "%s is not for machines", a)
			}
			*to = append(*to, a)
		})
	}
}

// seconds reads a time that a lease can last: a number, or as Go has it.
func (r *reader) seconds(n *yaml.Node, key string) time.Duration {
	text := r.text(n, key)
	d, err := time.ParseDuration(text)
	if s, bad := strconv.ParseUint(text, 10, 32); bad == nil {
		d, err = time.Duration(s)*time.Second, nil
	}
	switch {
	case text == "":
	case err != nil || d%time.Second != 0:
		r.add(key, "%q is not a time, such as 600 (seconds), 10m or 2h", text)
	case d < time.Second || d > math.MaxInt32*time.Second:
		r.add(key, "%s: a lease lasts for a second at least, and %d at most", text, math.MaxInt32)
	default:
		return d
	}
	return 0
}

// option reads an option by its number. Its value is checked with all others.
func (r *reader) option(n *yaml.Node, key string) (o hub.Option) {
	r.mapping(n, key, fields{
		"code": func(n *yaml.Node, key string) {
			if v, ok := r.number(n, key); ok && (v < 1 || v > 254) {
				r.add(key, "%d is not an option: from 1 to 254", v)
			} else if ok {
				o.Code = uint8(v)
			}
		},
		"type": func(n *yaml.Node, key string) { o.Type = r.text(n, key) },
		"value": func(n *yaml.Node, key string) {
			add := func(n *yaml.Node, key string) {
				if r.scalar(n, key) {
					o.Value = append(o.Value, n.Value)
				}
			}
			if n.Kind == yaml.SequenceNode {
				r.few(n, key, add)
			} else {
				add(n, key)
			}
		},
	})
	return o
}

func (r *reader) reservation(n *yaml.Node, key string) (one hub.Reservation) {
	r.mapping(n, key, fields{
		"address": func(n *yaml.Node, key string) { one.Address = r.address(n, key) },
		"mac": func(n *yaml.Node, key string) {
			mac, err := net.ParseMAC(r.text(n, key))
			if n.Value != "" && (err != nil || len(mac) != 6 || mac[0]&1 != 0 || [6]byte(mac) == [6]byte{}) {
				r.add(key, "%q is not a card's MAC address", n.Value)
				return
			}
			one.MAC = mac.String()
		},
		"client_id": func(n *yaml.Node, key string) {
			id := clientID(r.text(n, key))
			if n.Value != "" && (len(id) < 2 || len(id) > 255) {
				r.add(key, "it has %d bytes, and must have from 2 to 255 (RFC 2132)", len(id))
				return
			}
			one.ClientID = net.HardwareAddr(id).String()
		},
		"microvm": func(n *yaml.Node, key string) {
			text := r.text(n, key)
			namespace, name, ok := strings.Cut(text, "/")
			if !ok {
				namespace, name = vm.DefaultNamespace, text
			}
			switch {
			case text == "":
			case !vm.ValidName(namespace) || !vm.ValidName(name):
				r.add(key, "%q is not a microVM: NAME or NAMESPACE/NAME", text)
			default:
				one.MicroVM = namespace + "/" + name
			}
		},
	})
	return one
}

// clientID is bytes that are written as 01:0a:ff, or any other text as it is.
func clientID(text string) []byte {
	if !strings.Contains(text, ":") {
		return []byte(text)
	}
	var id []byte
	for part := range strings.SplitSeq(text, ":") {
		b, err := hex.DecodeString(part)
		if err != nil || len(b) != 1 {
			return []byte(text)
		}
		id = append(id, b[0])
	}
	return id
}

// setting is something that clients are told, as people say it.
type setting struct{ name, text string }

// settings are all but the segment's ranges, in order.
func (d DHCP) settings() []setting {
	all := settings("", d.Network)
	for _, s := range d.Subnets {
		all = append(all, setting{"subnet " + s.Prefix.String(), ranges(s.Ranges)})
		all = append(all, settings("in "+s.Prefix.String()+" ", s.Network)...)
	}
	return all
}

func settings(where string, n hub.Network) []setting {
	var all []setting
	add := func(name, text string) {
		if text != "" {
			all = append(all, setting{where + name, text})
		}
	}
	list := func(all any) string { return strings.Trim(fmt.Sprint(all), "[]") }
	add("exclude", list(n.Exclude))
	add("lease default", brief(n.Lease.Default))
	add("lease min", brief(n.Lease.Min))
	add("lease max", brief(n.Lease.Max))
	add("routers", list(n.Routers))
	add("dns", list(n.DNS))
	add("domain", n.Domain)
	add("ntp", list(n.NTP))
	if n.MTU != 0 {
		add("mtu", fmt.Sprint(n.MTU))
	}
	for _, r := range n.Routes {
		add("route to "+r.To.String(), "via "+r.Via.String())
	}
	for _, o := range n.Options {
		add(fmt.Sprint("option ", o.Code), strings.TrimSpace(fmt.Sprintf("%s %q", o.Type, strings.Join(o.Value, ", "))))
	}
	return all
}

// brief is a time without the noughts at its end; empty: none.
func brief(d time.Duration) string {
	if d == 0 {
		return ""
	}
	s := d.String()
	for _, end := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, end) {
			s = s[:len(s)-2]
		}
	}
	return s
}

// ranges says which they are.
func ranges(all []hub.Range) string {
	if len(all) == 0 {
		return "only for whom an address is kept"
	}
	texts := make([]string, len(all))
	for i, r := range all {
		texts[i] = r.String()
	}
	return strings.Join(texts, ", ")
}

// dhcpChanges says what clients will hear otherwise.
func dhcpChanges(was, is DHCP) []string {
	var lines []string
	find := func(all []setting, name string) string {
		i := slices.IndexFunc(all, func(s setting) bool { return s.name == name })
		if i < 0 {
			return ""
		}
		return all[i].text
	}
	before, now := was.settings(), is.settings()
	for _, s := range now {
		switch old := find(before, s.name); {
		case old == "":
			lines = append(lines, fmt.Sprintf("+ DHCP %s: %s", s.name, s.text))
		case old != s.text:
			lines = append(lines, fmt.Sprintf("~ DHCP %s: %s, was %s: who has a lease hears of it when it renews it", s.name, s.text, old))
		}
	}
	for _, s := range before {
		if find(now, s.name) == "" {
			lines = append(lines, fmt.Sprintf("- DHCP %s, which was %s", s.name, s.text))
		}
	}
	return lines
}
