package dhcp

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ingot/internal/need"
)

const networkd = "/lib/systemd/systemd-networkd"

// networkd needs neither systemd nor a bus: only a /sys that cannot be written, by
// which it knows a container, where it waits for no udev.
func TestNetworkd(t *testing.T) {
	need.Binary(t, networkd)
	segment(t)
	c := config(t)
	c.Subnets[0].Options.Routes = []Route{{netip.MustParsePrefix("10.8.0.0/14"), a("192.168.10.5")}}
	s, _ := start(t, c)
	if err := os.MkdirAll("/run/systemd/network", 0o755); err != nil {
		t.Fatal(err)
	}
	const unit = "[Match]\nName=cli\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n[DHCPv4]\nSendHostname=yes\nHostname=box\n"
	if err := os.WriteFile("/run/systemd/network/10-cli.network", []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	// It becomes its own user, if there is one.
	sh(t, "mkdir -p /run/systemd/netif/links /run/systemd/netif/leases; chown -R systemd-network /run/systemd/netif 2>/dev/null || true")
	out := background(t, in+"sh -c 'mount -o remount,ro /sys; SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console exec "+networkd+"'")
	card := cardOf(t, "cli")
	eventually(t, "it is leased an address", func() bool { l := only(s, card); return l != nil && l.State == Active })
	if l := only(s, card); l.IP != a("192.168.10.26") || l.Hostname != "box" || len(l.ClientID) == 0 {
		t.Errorf("got %+v\n%s", l, out)
	}
	eventually(t, "it uses the address", func() bool {
		return strings.Contains(sh(t, "ip -n client -4 -o addr show cli"), "192.168.10.26/25")
	})
	eventually(t, "it has the routes", func() bool {
		routes := sh(t, "ip -n client route show")
		return strings.Contains(routes, "10.8.0.0/14 via 192.168.10.5 ") && strings.Contains(routes, "default via 192.168.10.2 ")
	})
}

// captured is what tcpdump sees on an interface of this namespace while do runs.
func captured(t *testing.T, iface, filter string, do func()) string {
	t.Helper()
	need.Binary(t, "tcpdump")
	file := filepath.Join(t.TempDir(), "pcap")
	out := background(t, "tcpdump -i "+iface+" -U -w "+file+" "+filter)
	eventually(t, "tcpdump listens", func() bool { return strings.Contains(out.String(), "listening on") })
	do()
	var text string
	eventually(t, "it has seen the packets", func() bool {
		text = sh(t, "tcpdump -r "+file+" -vvv -n -e 2>/dev/null || true")
		return strings.Contains(text, "DHCP-Message (53), length 1: ACK")
	})
	return text
}

// What clients forgive: fields that must be so, the order of an answer, and that
// nothing is wrong by its checksum or its length.
func TestPacketsAsSeen(t *testing.T) {
	need.Binary(t, "busybox")
	segment(t)
	c := config(t)
	start(t, c)
	text := captured(t, "srv", "'udp and port 67'", func() {
		sh(t, in+"busybox udhcpc -i cli -n -q -f -t 3 -s "+script(t, "true")+" 2>&1")
	})
	own, err := net.InterfaceByName("srv")
	if err != nil {
		t.Fatal(err)
	}
	srv, card := own.HardwareAddr.String(), cardOf(t, "cli").String()
	answers := regexp.MustCompile(`(?s)`+srv+` > `+card+`, ethertype IPv4.*?END \(255\)`).FindAllString(text, -1)
	if len(answers) != 2 {
		t.Fatalf("%d answers to the client's own card:\n%s", len(answers), text)
	}
	for i, kind := range []string{"Offer", "ACK"} {
		rest := answers[i]
		for _, want := range []string{
			"192.168.10.2.67 > 192.168.10.26.68: ", "[udp sum ok] BOOTP/DHCP, Reply, length 300", "Your-IP 192.168.10.26", "Client-Ethernet-Address " + card,
			"DHCP-Message (53), length 1: " + kind, "Server-ID (54), length 4: 192.168.10.2", "Lease-Time (51), length 4: 600", "RN (58), length 4: 300", "RB (59), length 4: 525",
			"Subnet-Mask (1), length 4: 255.255.255.128", "Default-Gateway (3), length 4: 192.168.10.2",
			"Domain-Name-Server (6), length 8: 147.75.207.207,147.75.207.208", "END (255)",
		} {
			_, after, found := strings.Cut(rest, want)
			if !found {
				t.Errorf("%s has no %q, or not in order:\n%s", kind, want, answers[i])
				continue
			}
			rest = after
		}
		if regexp.MustCompile(`\bbad\b`).MatchString(answers[i]) { // as a word: it may be part of a transaction's number
			t.Errorf("tcpdump finds fault with\n%s", answers[i])
		}
	}
}

// Two subnets behind relays, which say more than their address: each client has what
// is its subnet's, and the relay gets its option back as it was, last of all.
func TestRelaysOfTwoSubnets(t *testing.T) {
	need.Binary(t, "dhcrelay")
	need.Binary(t, "busybox")
	segment(t)
	c := config(t)
	sh(t, "ip -n client addr add 192.168.10.5/25 dev cli")
	for _, n := range []string{"7", "8"} {
		sh(t, strings.ReplaceAll(`ip netns add farN && ip link add innerN netns client type veth peer name cli netns farN
			ip -n client addr add 10.N.0.1/24 dev innerN; ip -n client link set innerN up
			ip -n farN link set cli up; ip route add 10.N.0.0/24 via 192.168.10.5`, "N", n))
		t.Cleanup(func() { sh(t, "ip netns del far"+n) })
		c.Subnets = append(c.Subnets, Subnet{
			Prefix: netip.MustParsePrefix("10." + n + ".0.0/24"), Ranges: []Range{{a("10." + n + ".0.10"), a("10." + n + ".0.20")}},
			Options: Options{Routers: []netip.Addr{a("10." + n + ".0.1")}, Domain: "far" + n + ".example.org"},
		})
	}
	s, _ := start(t, c)
	out := background(t, in+"dhcrelay -4 -d -a -iu cli -id inner7 -id inner8 192.168.10.2")
	eventually(t, "the relay listens", func() bool { return strings.Contains(out.String(), "Sending on   Socket/fallback") })
	show := script(t, "env | grep -E '^(ip|router|domain)='")
	text := captured(t, "srv", "'udp and src host 192.168.10.2'", func() {
		for _, n := range []string{"7", "8"} {
			got := sh(t, "ip netns exec far"+n+" busybox udhcpc -i cli -n -q -f -t 5 -s "+show+" 2>&1")
			for _, want := range []string{"ip=10." + n + ".0.10\n", "router=10." + n + ".0.1\n", "domain=far" + n + ".example.org\n"} {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in\n%s", want, got)
				}
			}
		}
	})
	for _, n := range []string{"7", "8"} {
		if !regexp.MustCompile(`(?s)192.168.10.2.67 > 10.` + n + `.0.1.67: .*?DHCP-Message \(53\), length 1: ACK.*?Agent-Information \(82\), length \d+: *\n\s+Circuit-ID SubOption 1, length 6: inner` + n + `\n\s+END \(255\)`).MatchString(text) {
			t.Errorf("no ACK with its option, last, to the relay of 10.%s.0.0/24:\n%s", n, text)
		}
	}
	if all := s.Leases(); len(all) != 2 {
		t.Errorf("leases: %+v", all)
	}
}

// A DISCOVER on another interface of the hub, as the uplink is, gets no answer, though
// the server's port is the machine's.
func TestNoAnswerOnTheUplink(t *testing.T) {
	need.Binary(t, "busybox")
	segment(t)
	sh(t, "ip link add uplink type veth peer name cli2 netns client; ip addr add 203.0.113.1/24 dev uplink; ip link set uplink up; ip -n client link set cli2 up")
	t.Cleanup(func() { sh(t, "ip link del uplink 2>/dev/null || true") })
	s, _ := start(t, config(t))
	ask := func(iface string) string {
		return sh(t, in+"busybox udhcpc -i "+iface+" -n -q -f -t 3 -T 1 -s "+script(t, "true")+" 2>&1 || true")
	}
	if got := ask("cli2"); strings.Contains(got, "lease of") || !strings.Contains(got, "no lease, failing") {
		t.Errorf("on the uplink the client says\n%s", got)
	}
	if f := s.Facts(); f.Offers != 0 || len(s.Leases()) != 0 {
		t.Errorf("the server has offered: %+v", f)
	}
	if got := ask("cli"); !strings.Contains(got, "lease of 192.168.10.26 obtained") {
		t.Errorf("on the segment it says\n%s", got)
	}
}
