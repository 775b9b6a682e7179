package nat_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"ingot/internal/nat"
)

func TestParseEgress(t *testing.T) {
	good := []string{
		"allow 10.1.2.3 443/tcp", "deny private", "deny 203.0.113.0/24 icmp", "allow all 8000-8100/udp", "allow 198.51.100.0/24 tcp", "deny all",
	}
	e, err := nat.ParseEgress(good)
	if err != nil || !slices.Equal(e.Texts(), good) {
		t.Errorf("%v, %v", e, err)
	}
	if e, err := nat.ParseEgress([]string{"allow  10.0.0.1/32", "deny 0.0.0.0/0"}); err != nil || e.String() != "allow 10.0.0.1, deny all" {
		t.Errorf("%v, %v", e, err)
	}
	if e, err := nat.ParseEgress(nil); err != nil || len(e) != 0 {
		t.Errorf("%v, %v", e, err)
	}
	for text, want := range map[string]string{
		"":                           "two or three words",
		"allow":                      "two or three words",
		"permit all":                 "neither allow nor deny",
		"deny 10.0.0.1/8":            "is it 10.0.0.0/8",
		"deny fd00::/8":              "no IPv4 prefix",
		"deny host.example":          "no IPv4 prefix",
		"deny all 443":               "no service",
		"deny all 443/icmp":          "has no ports",
		"deny all 0/tcp":             "no port",
		"deny all 90-80/tcp":         "no range",
		"deny all tcp udp":           "two or three words",
		"allow 10.0.0.0/8":           "no rule denies",
		"allow all\ndeny private":    "has no effect",
		"deny all\nallow 10.0.0.0/8": "has no effect",
	} {
		if e, err := nat.ParseEgress(strings.Split(text, "\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want %s", text, e, err, want)
		}
	}
}

func FuzzParseEgress(f *testing.F) {
	f.Add("allow 10.1.0.0/16 1-2/tcp")
	f.Fuzz(func(t *testing.T, text string) {
		e, err := nat.ParseEgress([]string{text, "deny all"})
		if err != nil {
			return
		}
		if again, err := nat.ParseEgress(e.Texts()); err != nil || again.String() != e.String() {
			t.Errorf("%q is %s, which is %v, %v", text, e, again, err)
		}
	})
}

func restricted(t *testing.T, card net.HardwareAddr, rules ...string) nat.Restricted {
	t.Helper()
	e, err := nat.ParseEgress(rules)
	if err != nil {
		t.Fatal(err)
	}
	return nat.Restricted{Card: card, Egress: e}
}

// setCard gives a namespace's card a MAC address.
func setCard(t *testing.T, ns, mac string) net.HardwareAddr {
	t.Helper()
	ip(t, "-n "+ns+" link set eth0 address "+mac)
	card, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return card
}

// TestEgress: a guest opens outside what its rules let it, whoever else may do what.
func TestEgress(t *testing.T) {
	web, other, outside := plainHub(t)
	ip(t, "route add 10.0.0.0/8 via 203.0.113.9")
	for _, address := range []string{"203.0.113.9:80", "203.0.113.9:443", "10.1.2.3:80", "10.1.2.3:443"} {
		serve(t, outside, address)
	}
	talk(t, web, "192.168.10.30:80", "web")
	serve(t, other, "192.168.10.40:80")
	answer(t, "tcp", "192.168.10.2:53")
	third := wire(t, "third")
	ip(t, "link set third master "+hub.Inside)
	ip(t, "-n "+third+" addr add 192.168.10.50/25 dev eth0")
	ip(t, "-n "+third+" route add default via 192.168.10.2")
	// One card has two addresses: both are held to its rules.
	const first, also, second, free = "192.168.10.30", "192.168.10.31", "192.168.10.50", "192.168.10.40"
	one, two := setCard(t, web, "02:00:00:00:00:01"), setCard(t, third, "02:00:00:00:00:02")
	h := hub
	h.Published = []nat.Published{published(t, "8080:80", first)}
	h.Restricted = []nat.Restricted{
		restricted(t, one, "allow 10.1.2.3 443/tcp", "deny private"),
		restricted(t, two, "allow 203.0.113.0/24 80-90/tcp", "deny all"),
	}
	for range 2 {
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "hub-egress.nft", "ip", nat.Table)
	// Of two policies for one card the first counts, and no rules are kept back.
	h.Restricted = append(h.Restricted, restricted(t, two, "deny private"))
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	attempts := []attempt{
		{web, first, "tcp", "203.0.113.9:80", true}, {web, first, "udp", "203.0.113.9:80", true}, {web, first, "tcp", "10.1.2.3:443", true},
		{web, first, "tcp", "10.1.2.3:80", false}, {web, first, "udp", "10.1.2.3:443", false},
		{web, also, "tcp", "10.1.2.3:443", true}, {web, also, "tcp", "10.1.2.3:80", false},
		{third, second, "tcp", "203.0.113.9:80", true}, {third, second, "tcp", "203.0.113.9:443", false},
		{third, second, "udp", "203.0.113.9:80", false}, {third, second, "tcp", "10.1.2.3:443", false},
		{other, free, "tcp", "10.1.2.3:80", true}, {other, free, "tcp", "203.0.113.9:443", true},
		{third, second, "tcp", "192.168.10.40:80", true}, {third, second, "tcp", "192.168.10.2:53", true}, // the segment is none of it
	}
	try(t, attempts)
	// Who comes in by a port is answered, also by a guest that may open nothing.
	h.Restricted[0] = restricted(t, one, "deny all")
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	if got := converse(t, outside, "tcp", "203.0.113.2:8080").says(20 * time.Second); got != "web" {
		t.Errorf("by a published port %q answers", got)
	}
	try(t, []attempt{{web, first, "tcp", "203.0.113.9:80", false}})

	rules, err := nat.CheckHub(h)
	if err != nil || len(rules) != 2+1+2 || slices.ContainsFunc(rules, func(r nat.Rule) bool { return !r.Present }) {
		t.Errorf("check: %v, %v", rules, err)
	}
	for command, want := range map[string]string{
		"delete element ip ingot egress { 02:00:00:00:00:02 }":                                                                    "ipv4 filter FORWARD 0 -m mac --mac-source 02:00:00:00:00:02 -j egress-2",
		"delete element ip ingot egress { 02:00:00:00:00:02 }; add element ip ingot egress { 02:00:00:00:00:02 : jump egress-1 }": "ipv4 filter FORWARD 0 -m mac --mac-source 02:00:00:00:00:02 -j egress-2",
		"flush chain ip ingot egress-1":                              "egress-1: 1: deny all",
		"insert rule ip ingot egress-1 accept":                       "chain egress-1 as it was made, with no other rules",
		"add element ip ingot egress { 02:00:00:00:00:09 : accept }": "set egress",
	} {
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
		nft(t, command)
		rules, err := nat.CheckHub(h)
		if err != nil || !slices.Contains(rules, nat.Rule{Text: want}) {
			t.Errorf("after nft %s: %v, %v", command, rules, err)
		}
	}
}

// TestEgressChanges: what a new policy denies ends at once, and nothing else.
func TestEgressChanges(t *testing.T) {
	web, _, outside := plainHub(t)
	talk(t, outside, "203.0.113.9:80", "world")
	h := hub
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	card := setCard(t, web, "02:00:00:00:00:01")
	a := converse(t, web, "tcp", "203.0.113.9:80")
	ask := func(want string, rules ...string) {
		t.Helper()
		h.Restricted = nil
		if len(rules) > 0 {
			h.Restricted = []nat.Restricted{restricted(t, card, rules...)}
		}
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
		within := 20 * time.Second
		if want == "" {
			within = time.Second
		}
		if got := a.says(within); got != want {
			t.Errorf("with %q: %q", rules, got)
		}
	}
	ask("world")
	ask("world", "deny private")
	for i := range 20 {
		ask("world", fmt.Sprintf("deny 10.0.%d.0/24", i))
	}
	ask("", "deny all 80/tcp")
}

// inForce sets a hub's rules, of which so many that nft lists have a text, and has them checked.
func inForce(t *testing.T, h nat.Hub, text string, want int) []nat.Rule {
	t.Helper()
	began := time.Now()
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	t.Logf("set in %s", time.Since(began))
	out, err := exec.Command("nft", "list", "table", "ip", nat.Table).Output()
	if n := strings.Count(string(out), text); err != nil || n != want {
		t.Errorf("%d of %q, %v", n, text, err)
	}
	rules, err := nat.CheckHub(h)
	if err != nil || slices.ContainsFunc(rules, func(r nat.Rule) bool { return !r.Present }) {
		t.Errorf("check: %d rules, %v", len(rules), err)
	}
	return rules
}

// TestManyRestricted: microVMs with one policy share its chain.
func TestManyRestricted(t *testing.T) {
	plainHub(t)
	h := hub
	for i := range 1000 {
		h.Restricted = append(h.Restricted, restricted(t, net.HardwareAddr{2, 0, 0, 0, byte(i >> 8), byte(i)}, "deny private", fmt.Sprintf("deny all %d/tcp", 1+i%3)))
	}
	if rules := inForce(t, h, "chain egress-", 3); len(rules) != 1002 {
		t.Errorf("check: %d rules", len(rules))
	}
}

// TestManyRules: as many rules as somebody may have are set and read, and not only as
// many as the kernel confirms at once.
func TestManyRules(t *testing.T) {
	plainHub(t)
	h := hub
	for i := range 10 {
		var rules []string
		for n := range 200 {
			rules = append(rules, fmt.Sprintf("deny 10.%d.%d.0/24", i, n))
		}
		h.Restricted = append(h.Restricted, restricted(t, net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}, rules...))
	}
	inForce(t, h, "ip daddr 10.", 2000)
}

// TestNoConnection: a packet that belongs to no connection does not leave, past rules and
// without NAT.
func TestNoConnection(t *testing.T) {
	web, _, outside := plainHub(t)
	leaves := func() bool {
		t.Helper()
		in, out := rawTCP(t, outside), rawTCP(t, web)
		defer in.Close()
		defer out.Close()
		answer := make([]byte, 20) // a TCP header
		binary.BigEndian.PutUint16(answer[0:], 80)
		binary.BigEndian.PutUint16(answer[2:], 4444)
		answer[12], answer[13] = 5<<4, 0x12 // SYN, ACK
		if _, err := out.WriteTo(answer, &net.IPAddr{IP: net.IPv4(203, 0, 113, 9)}); err != nil {
			t.Fatal(err)
		}
		in.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		for b := make([]byte, 1500); ; {
			n, from, err := in.ReadFrom(b)
			if err != nil {
				return false
			}
			if n >= 20 && binary.BigEndian.Uint16(b[2:]) == 4444 && from.String() == "192.168.10.30" {
				return true
			}
		}
	}
	if !leaves() {
		t.Fatal("without rules it does not leave either")
	}
	if err := nat.SetHub(hub); err != nil {
		t.Fatal(err)
	}
	if leaves() {
		t.Error("it leaves")
	}
}

// rawTCP is a raw socket of a namespace's.
func rawTCP(t *testing.T, ns string) (c net.PacketConn) {
	t.Helper()
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := enter(ns)
		if err == nil {
			c, err = net.ListenPacket("ip4:tcp", "0.0.0.0")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	return c
}
