package nat_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ingot/internal/dhcp"
	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/need"
)

// machine makes a guest of a namespace: its card is on the bridge, as a tap's would be.
func machine(t *testing.T, g *nat.Guard, device string, mac net.HardwareAddr, allowed ...string) (ns string) {
	t.Helper()
	ns = wire(t, device)
	ip(t, "-n "+ns+" link set eth0 down address "+mac.String())
	ip(t, "-n "+ns+" link set eth0 up") // with a link-local address that is made of this
	ip(t, "link set "+device+" master ingot0")
	set(t, g, device, mac, allowed...)
	return ns
}

func set(t *testing.T, g *nat.Guard, device string, mac net.HardwareAddr, allowed ...string) {
	t.Helper()
	guest := nat.Guest{MAC: mac}
	for _, a := range allowed {
		guest.Allowed = append(guest.Allowed, netip.MustParsePrefix(a))
	}
	if err := g.Set(device, guest); err != nil {
		t.Fatal(err)
	}
}

// hubOn gives the segment's interface the hub's address.
func hubOn(t *testing.T, h nat.Host) {
	t.Helper()
	ip(t, "link set lo up")
	if _, err := link.Sysctl(h.Bridge, "arp_ignore", "1"); err != nil { // as in a lab's machines
		t.Fatal(err)
	}
	ip(t, "addr add 192.168.10.2/25 dev "+h.Segment)
}

// pings says whether an address answers a namespace that asks from another.
func pings(ns, from, to string) bool {
	for range 2 { // the first may be lost while ARP asks
		if exec.Command("ip", "netns", "exec", ns, "busybox", "ping", "-c", "1", "-W", "1", "-I", from, to).Run() == nil {
			return true
		}
	}
	return false
}

const clientScript = `#!/bin/sh
# For udhcpc and for dhclient.
case "$1$reason" in
deconfig|PREINIT) ip link set "$interface" up ;;
bound|renew|BOUND|RENEW|REBOOT) ip addr replace "${ip:-$new_ip_address}/25" dev "$interface" ;;
esac
`

// asks has a real client ask for an address, which it then has and keeps.
func asks(t *testing.T, ns, client string) (address string) {
	t.Helper()
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte(clientScript), 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"busybox", "udhcpc", "-i", "eth0", "-f", "-n", "-t", "10", "-T", "1", "-s", script}
	if client == "dhclient" {
		args = []string{"dhclient", "-1", "-d", "-sf", script, "-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"), "eth0"}
	}
	serving(t, append([]string{"ip", "netns", "exec", ns}, args...)...)
	for range 300 {
		out, err := exec.Command("ip", "-n", ns, "-4", "-o", "addr", "show", "dev", "eth0").Output()
		if err != nil {
			t.Fatal(err)
		}
		if found := regexp.MustCompile(`inet ([0-9.]+)/25`).FindSubmatch(out); found != nil {
			return string(found[1])
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s gets no address", client)
	return ""
}

// serving runs a server, or a client that renews, until the test ends.
func serving(t *testing.T, args ...string) {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", args[0], out.Bytes())
		}
	})
}

// servers are those that guests may meet, each on the segment's interface.
var servers = []struct {
	name, binary string
	lasts        string // how long what it gives is kept: Kea has the options in another order for some clients
	clients      []string
	serve        func(t *testing.T, device, dir string)
}{
	{"ours", "", "2h", []string{"udhcpc", "dhclient"}, func(t *testing.T, device, dir string) {
		s, err := dhcp.New(dhcp.Config{
			Interface: device, Server: netip.MustParseAddr("192.168.10.2"), Authoritative: true,
			Subnets:   []dhcp.Subnet{{Prefix: netip.MustParsePrefix("192.168.10.0/25"), Ranges: []dhcp.Range{{First: netip.MustParseAddr("192.168.10.40"), Last: netip.MustParseAddr("192.168.10.49")}}}},
			LeaseFile: filepath.Join(dir, "leases"), ConfigFile: filepath.Join(dir, "conf"), DefaultsFile: filepath.Join(dir, "defaults"),
			Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}},
	{"dnsmasq", "dnsmasq", "1d", []string{"udhcpc"}, func(t *testing.T, device, dir string) {
		serving(t, "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--user=root", "--interface="+device, "--bind-interfaces", "--dhcp-authoritative",
			"--dhcp-range=192.168.10.40,192.168.10.49,255.255.255.128,12h", "--dhcp-leasefile="+filepath.Join(dir, "leases"), "--pid-file="+filepath.Join(dir, "pid"))
	}},
	{"isc", "dhcpd", "1d", []string{"udhcpc"}, func(t *testing.T, device, dir string) {
		file(t, filepath.Join(dir, "leases"), "")
		file(t, filepath.Join(dir, "conf"), "authoritative; subnet 192.168.10.0 netmask 255.255.255.128 { range 192.168.10.40 192.168.10.49; }")
		serving(t, "dhcpd", "-f", "-d", "-cf", filepath.Join(dir, "conf"), "-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"), device)
	}},
	{"kea", "kea-dhcp4", "2h|7d", []string{"udhcpc", "dhclient"}, func(t *testing.T, device, dir string) {
		file(t, filepath.Join(dir, "conf"), fmt.Sprintf(`{"Dhcp4": {"interfaces-config": {"interfaces": [%q]}, "lease-database": {"type": "memfile", "persist": false},
			"subnet4": [{"id": 1, "subnet": "192.168.10.0/25", "interface": %q, "pools": [{"pool": "192.168.10.40-192.168.10.49"}]}]}}`, device, device))
		t.Setenv("KEA_PIDFILE_DIR", dir)
		t.Setenv("KEA_LOCKFILE_DIR", dir)
		serving(t, "kea-dhcp4", "-c", filepath.Join(dir, "conf"))
	}},
}

func file(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestLeaseIsLearnt: a guest has the address that a real server gives it, and no
// other; by real servers and clients.
func TestLeaseIsLearnt(t *testing.T) {
	for _, s := range servers {
		for _, client := range s.clients {
			t.Run(s.name+" "+client, func(t *testing.T) {
				need.Binary(t, "busybox")
				need.Binary(t, program(client))
				if s.binary != "" {
					need.Binary(t, s.binary)
				}
				g, h, _, _, _ := segment(t)
				hubOn(t, h)
				ns := machine(t, g, "fltap00000a1", link.MAC("a1"))
				dir, err := os.MkdirTemp("/tmp", "ingot-nat-test") // dhcpd may be kept to where it writes
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { os.RemoveAll(dir) })
				s.serve(t, h.Segment, dir)
				address := asks(t, ns, client)
				if !pings(ns, address, "192.168.10.2") {
					t.Error("a guest can't use the address that DHCP gave it")
				}
				if got := learnt(t, "fltap00000a1"); !regexp.MustCompile("^" + address + " timeout (" + s.lasts + ")$").MatchString(got) {
					t.Errorf("learnt: %q, and %s was given", got, address)
				}
				ip(t, "-n "+ns+" addr add 192.168.10.77/25 dev eth0")
				if pings(ns, "192.168.10.77", "192.168.10.2") {
					t.Error("a guest can use an address that nobody gave it")
				}
			})
		}
	}
}

// program is a client's.
func program(client string) string {
	if client == "udhcpc" {
		return "busybox"
	}
	return client
}

// learnt are the addresses of a device, and for how long.
func learnt(t *testing.T, device string) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "set", "bridge", "ingot", "addresses").CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	var all []string
	for _, found := range regexp.MustCompile(`"`+device+`" \. ([0-9.]+ timeout \S+) expires`).FindAllSubmatch(out, -1) {
		all = append(all, string(found[1]))
	}
	return strings.Join(all, ", ")
}

// gives has the world's end tell a card that it has an address, which the guest hears.
func (c card) gives(to card, mac net.HardwareAddr, your string, lease time.Duration) {
	c.t.Helper()
	c.send(append(acknowledge(mac, your, lease), "given "+your...))
	if !to.heard("given "+your, 20*time.Second) {
		c.t.Fatalf("%s hears nothing from the DHCP server", to.name)
	}
}

// uses says whether the world hears a guest that sends from an address.
func (c card) uses(world card, mac net.HardwareAddr, address string) bool {
	c.t.Helper()
	frame := func(from, text string) []byte {
		return ether(everyone, mac, 0x0800, ipv4(from, "1.1.1.1", 17, 0, 0, udp(1000, 1000, []byte(text))))
	}
	mark := fmt.Sprintf("|%s %s %d|", c.name, address, time.Now().UnixNano())
	c.send(frame(address, mark))
	c.send(ether(everyone, mac, 0x88b5, []byte("after"+mark)))
	world.file.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 2048)
	for heard := false; ; {
		n, err := world.file.Read(b)
		if err != nil {
			c.t.Fatalf("%s is not heard: %v", c.name, err)
		}
		if bytes.Contains(b[:n], []byte("after"+mark)) {
			return heard
		}
		heard = heard || bytes.Contains(b[:n], []byte(mark))
	}
}

// TestLeaseIsOnesOwn: what a server tells everybody is for one, and an address is at
// one place.
func TestLeaseIsOnesOwn(t *testing.T) {
	g, h, guest, other, world := segment(t)
	const first, second = "192.168.10.40", "192.168.10.41"
	world.gives(guest, guestMAC, first, 10*time.Minute)
	if !guest.uses(world, guestMAC, first) || other.uses(world, otherMAC, first) {
		t.Error("what is given to one of two that hear it is not that one's")
	}
	for lease, want := range map[time.Duration]string{2 * time.Hour: "2h", 3 * time.Hour: "1d", 48 * time.Hour: "7d", 0xffffffff * time.Second: "365d"} {
		world.gives(guest, guestMAC, first, lease)
		if got := learnt(t, guestTap); got != first+" timeout "+want {
			t.Errorf("a lease of %v: %s", lease, got)
		}
	}
	for name, b := range map[string][]byte{
		"an offer":              answerTo(guestMAC, 2, second, time.Hour),
		"a refusal":             answerTo(guestMAC, 6, second, time.Hour),
		"for another card":      answerTo(worldMAC, 5, second, time.Hour),
		"cut before the type":   answerTo(guestMAC, 5, second, time.Hour)[:240],
		"no address":            answerTo(guestMAC, 5, "0.0.0.0", time.Hour),
		"another kind of card":  append([]byte{2, 6, 6}, answerTo(guestMAC, 5, second, time.Hour)[3:]...),
		"a client's own answer": append([]byte{1, 1, 6}, answerTo(guestMAC, 5, second, time.Hour)[3:]...),
	} {
		world.send(append(ether(everyone, worldMAC, 0x0800, ipv4("192.168.10.2", "255.255.255.255", 17, 0, 0, udp(67, 68, b))), name...))
		if !guest.heard(name, 20*time.Second) {
			t.Fatalf("the guest does not hear %s", name)
		}
		if guest.uses(world, guestMAC, second) || guest.uses(world, guestMAC, "0.0.0.0") {
			t.Errorf("%s gives an address", name)
		}
	}
	other.send(append(ether(guestMAC, otherMAC, 0x0800, ipv4("192.168.10.2", "255.255.255.255", 17, 0, 0, udp(67, 68, answerTo(guestMAC, 5, second, time.Hour)))), "from a guest"...))
	if guest.heard("from a guest", 50*time.Millisecond) || guest.uses(world, guestMAC, second) {
		t.Error("a guest gives another one an address")
	}
	// A guest that changes its address, and one that is given another's.
	world.gives(guest, guestMAC, second, 10*time.Minute)
	look(t, g, nil)
	if guest.uses(world, guestMAC, first) || !guest.uses(world, guestMAC, second) {
		t.Error("a guest with another address still has its earlier one")
	}
	world.gives(other, otherMAC, second, 10*time.Minute)
	look(t, g, nil)
	if guest.uses(world, guestMAC, second) || !other.uses(world, otherMAC, second) {
		t.Error("an address is at two places")
	}
	// One that gives it back, one that is gone, and one that comes again.
	other.send(ether(everyone, otherMAC, 0x0800, ipv4(second, "192.168.10.2", 17, 0, 0, udp(68, 67, release(otherMAC, second)))))
	if other.uses(world, otherMAC, second) {
		t.Error("a guest has an address that it has given back")
	}
	world.gives(other, otherMAC, second, 10*time.Minute)
	for _, guest := range []nat.Guest{{}, {MAC: otherMAC}} {
		if err := g.Set(otherTap, guest); err != nil {
			t.Fatal(err)
		}
		look(t, g, nil)
	}
	if other.uses(world, otherMAC, second) {
		t.Error("a guest has the address of one that had its device before")
	}
	world.gives(other, otherMAC, second, 10*time.Minute)
	if g, err := nat.OpenGuard(h); err != nil || g == nil {
		t.Fatal(err)
	}
	if !other.uses(world, otherMAC, second) || guest.uses(world, guestMAC, second) {
		t.Error("another guard does not know what an earlier one knew")
	}
}

func release(mac net.HardwareAddr, address string) []byte {
	b := answerTo(mac, 7, "0.0.0.0", 0)
	b[0] = 1
	copy(b[12:], netip.MustParseAddr(address).AsSlice())
	return b
}

// look has a guard look once, and shows what it has refused.
func look(t *testing.T, g *nat.Guard, refused func([]nat.Refusal)) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err := g.Keep(ctx, func() {}, func(all []nat.Refusal) {
		if refused != nil {
			refused(all)
		}
		stop()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLeasesOutliveRules: also where the rules are thrown away, and where an earlier
// version has learnt nothing, a guest that runs goes on.
func TestLeasesOutliveRules(t *testing.T) {
	earlier, h, guest, other, world := segment(t)
	const first, second, third = "192.168.10.40", "192.168.10.41", "192.168.10.42"
	world.gives(guest, guestMAC, first, 10*time.Minute)
	look(t, earlier, nil)
	nft(t, "flush ruleset")
	look(t, earlier, nil)
	if !guest.uses(world, guestMAC, first) || guest.uses(world, guestMAC, second) {
		t.Error("after nft flush ruleset a guest has not just its own address")
	}
	// Of this one it was not known what it has.
	if !other.uses(world, otherMAC, second) || other.uses(world, otherMAC, "192.168.10.2") {
		t.Error("after nft flush ruleset a guest is cut off, or is a machine")
	}
	world.gives(other, otherMAC, second, 10*time.Minute)
	if !other.uses(world, otherMAC, second) || other.uses(world, otherMAC, third) {
		t.Error("a guest whose lease is renewed is not held to it")
	}

	nft(t, "delete table bridge ingot")
	nft(t, fmt.Sprintf(`table bridge ingot {
		set guests { type ifname . ether_addr; elements = { %q . %s }; }
		chain prerouting { type filter hook prerouting priority dstnat; iifname "fltap*" iifname . ether saddr != @guests drop; }
	}`, guestTap, guestMAC))
	if !guest.uses(world, guestMAC, third) {
		t.Fatal("the earlier version holds a guest to an address")
	}
	g, err := nat.OpenGuard(h)
	if err != nil {
		t.Fatal(err)
	}
	// One that it knew, and one that was not guarded.
	if err := g.Set(otherTap, nat.Guest{MAC: otherMAC, Running: true}); err != nil {
		t.Fatal(err)
	}
	for i, c := range []card{guest, other} {
		mac, own := []net.HardwareAddr{guestMAC, otherMAC}[i], []string{first, second}[i]
		if !c.uses(world, mac, own) {
			t.Errorf("%s is cut off by a newer version", c.name)
		}
		world.gives(c, mac, own, 10*time.Minute)
		if !c.uses(world, mac, own) || c.uses(world, mac, third) {
			t.Errorf("%s is not held to its lease, which was renewed", c.name)
		}
	}
}

// TestAddressMovesBetweenGuests: a cluster's address is where it was announced last.
func TestAddressMovesBetweenGuests(t *testing.T) {
	need.Binary(t, "busybox")
	g, h, _, _, _ := segment(t)
	hubOn(t, h)
	const cluster = "192.168.10.25"
	a := machine(t, g, "fltap00000a1", link.MAC("a1"), "192.168.10.51/32", cluster+"/32")
	b := machine(t, g, "fltap00000b1", link.MAC("b1"), "192.168.10.52/32", cluster+"/32")
	c := machine(t, g, "fltap00000c1", link.MAC("c1"), "192.168.10.53/32")
	for ns, address := range map[string]string{a: "192.168.10.51", b: "192.168.10.52", c: "192.168.10.53"} {
		ip(t, "-n "+ns+" addr add "+address+"/25 dev eth0")
	}
	is := func() string {
		out, _ := exec.Command("ip", "neigh", "show", cluster, "dev", h.Segment).Output()
		return string(out)
	}
	take := func(ns string) {
		ip(t, "-n "+ns+" addr add "+cluster+"/25 dev eth0")
		exec.Command("ip", "netns", "exec", ns, "busybox", "arping", "-U", "-c", "1", "-w", "1", "-I", "eth0", cluster).Run()
		exec.Command("ip", "netns", "exec", ns, "busybox", "arping", "-A", "-c", "1", "-w", "1", "-I", "eth0", cluster).Run()
	}
	take(a)
	if !pings(c, "192.168.10.53", cluster) || !pings(a, cluster, "192.168.10.2") || !strings.Contains(is(), link.MAC("a1").String()) {
		t.Fatalf("the first one does not get it: %s", is())
	}
	ip(t, "-n "+a+" addr del "+cluster+"/25 dev eth0")
	take(b)
	if !strings.Contains(is(), link.MAC("b1").String()) || !pings(c, "192.168.10.53", cluster) || !pings(b, cluster, "192.168.10.2") {
		t.Errorf("the second one does not get it: %s", is())
	}
	take(c)
	if strings.Contains(is(), link.MAC("c1").String()) || pings(c, cluster, "192.168.10.2") {
		t.Errorf("one gets it that may not have it: %s", is())
	}
	var told []nat.Refusal
	look(t, g, func(all []nat.Refusal) { told = all })
	if len(told) != 1 || told[0].Device != "fltap00000c1" || told[0].Address.String() != cluster || told[0].Packets == 0 {
		t.Errorf("refused: %v", told)
	}
	// While it runs, it is allowed to, and then no more.
	set(t, g, "fltap00000c1", link.MAC("c1"), "192.168.10.53/32", "192.168.10.24/30")
	if !pings(c, cluster, "192.168.10.2") {
		t.Error("a guest can't use an address that was allowed to it later")
	}
	if look(t, g, func(all []nat.Refusal) { told = all }); len(told) > 0 {
		t.Errorf("still refused: %v", told)
	}
	set(t, g, "fltap00000c1", link.MAC("c1"), "192.168.10.53/32")
	if pings(c, cluster, "192.168.10.2") || !pings(c, "192.168.10.53", "192.168.10.2") {
		t.Error("a guest can use an address that is not allowed to it any more, or not the one that is")
	}
}

// TestNeighboursOfIPv6: guests with the addresses that they make themselves reach each
// other, and nobody else's.
func TestNeighboursOfIPv6(t *testing.T) {
	need.Binary(t, "busybox")
	g, _, _, _, _ := segment(t)
	a, b := machine(t, g, "fltap00000a1", link.MAC("a1")), machine(t, g, "fltap00000b1", link.MAC("b1"), "2001:db8::25/128")
	ip(t, "-n "+a+" addr add "+made("2001:db8:1::", link.MAC("a1"))+"/64 dev eth0 nodad")
	ip(t, "-n "+b+" addr add 2001:db8::25/64 dev eth0 nodad")
	ip(t, "-n "+a+" addr add 2001:db8::a/64 dev eth0 nodad")
	ip(t, "-n "+b+" addr add "+made("2001:db8:1::", link.MAC("b1"))+"/64 dev eth0 nodad")
	linkLocal := func(mac net.HardwareAddr) string { return made("fe80::", mac) + "%eth0" }
	deadline := time.Now().Add(20 * time.Second) // its own is tentative for a second
	for !pings(a, "eth0", linkLocal(link.MAC("b1"))) {
		if time.Now().After(deadline) {
			t.Fatal("guests don't reach each other by link-local addresses")
		}
	}
	if from := made("2001:db8:1::", link.MAC("a1")); !pings(a, from, made("2001:db8:1::", link.MAC("b1"))) {
		t.Error("guests don't reach each other by addresses that are made of their MACs")
	}
	if !pings(b, "2001:db8::25", made("2001:db8:1::", link.MAC("b1"))) { // itself
		t.Error("a guest does not reach itself")
	}
	if pings(a, "2001:db8::a", "2001:db8::25") {
		t.Error("a guest uses an IPv6 address that is not its own")
	}
	set(t, g, "fltap00000a1", link.MAC("a1"), "2001:db8::a/128")
	if !pings(a, "2001:db8::a", "2001:db8::25") {
		t.Error("a guest can't use IPv6 addresses that are allowed to it")
	}
}
