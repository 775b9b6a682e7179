package nat_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"ingot/internal/nat"
)

func TestParsePort(t *testing.T) {
	for text, want := range map[string]string{
		"8080:80": "8080:80/tcp", "8080:80/tcp": "8080:80/tcp", "53:53/udp": "53:53/udp",
		"203.0.113.2:8080:80": "203.0.113.2:8080:80/tcp", "0.0.0.0:8080:80": "8080:80/tcp", "65535:1": "65535:1/tcp",
	} {
		p, err := nat.ParsePort(text)
		if err != nil || p.String() != want {
			t.Errorf("%q: %s, %v, want %s", text, p, err, want)
		}
		if again, err := nat.ParsePort(p.String()); err != nil || again != p {
			t.Errorf("%s: %v, %v", p, again, err)
		}
	}
	for _, text := range []string{
		"", ":", "80", "80/udp", ":80", "80:", "0:80", "80:0", "65536:1", "-1:80", "80:80/", "80:80/icmp", "80:80/TCP", "a:80", "1:2:3", "x:1:2", "::1:80:80", "[::1]:80:80",
		"1.2.3.4:80", "1.2.3.4:5:6:7", "80-81:80-81", " 80:80",
	} {
		if p, err := nat.ParsePort(text); err == nil {
			t.Errorf("%q is read as %s", text, p)
		}
	}
}

func TestParseOutside(t *testing.T) {
	for text, want := range map[string]string{"8080": "8080 tcp", "8080/udp": "8080 udp", "203.0.113.2:8080": "203.0.113.2:8080 tcp", "0.0.0.0:53/udp": "53 udp"} {
		if p, err := nat.ParseOutside(text); err != nil || p.Outside()+" "+p.Protocol != want {
			t.Errorf("%q: %s, %v, want %s", text, p, err, want)
		}
	}
	for _, text := range []string{"", "0", "/", "8080/", "x:80", "8080:80", "203.0.113.2:8080:80", "203.0.113.2:"} {
		if p, err := nat.ParseOutside(text); err == nil {
			t.Errorf("%q is read as %s", text, p)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	f.Add("203.0.113.2:8080:80/udp")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := nat.ParsePort(text)
		if err != nil {
			return
		}
		if again, err := nat.ParsePort(p.String()); err != nil || again != p {
			t.Errorf("%q is %s, which is %v, %v", text, p, again, err)
		}
	})
}

func TestCollides(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"80:80", "80:81", true}, {"80:80", "81:80", false}, {"80:80", "80:80/udp", false}, {"80:80", "203.0.113.2:80:80", true},
		{"203.0.113.2:80:80", "203.0.113.3:80:80", false}, {"203.0.113.2:80:80", "203.0.113.2:80:81", true},
	} {
		a, b := parsed(t, c.a), parsed(t, c.b)
		if a.Collides(b) != c.want || b.Collides(a) != c.want {
			t.Errorf("%s and %s: not %v", a, b, c.want)
		}
	}
}

func parsed(t *testing.T, text string) nat.Port {
	t.Helper()
	p, err := nat.ParsePort(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func published(t *testing.T, text, guest string) nat.Published {
	t.Helper()
	return nat.Published{Port: parsed(t, text), Guest: netip.MustParseAddr(guest)}
}

// plainHub is a hub with two guests and a machine on its segment, and somebody outside.
// Each has another namespace.
func plainHub(t *testing.T) (web, other, outside string) {
	t.Helper()
	needs(t)
	nft(t, "flush ruleset")
	ip(t, "link set lo up")
	ip(t, "link add "+hub.Inside+" type bridge")
	t.Cleanup(func() {
		exec.Command("ip", "link", "del", hub.Inside).Run()
		exec.Command("nft", "flush ruleset").Run()
	})
	ip(t, "link set "+hub.Inside+" up")
	web, other, outside = wire(t, "web"), wire(t, "other"), wire(t, hub.Outside)
	for _, line := range []string{
		"link set web master " + hub.Inside, "link set other master " + hub.Inside,
		"addr add 192.168.10.2/25 dev " + hub.Inside, "addr add 203.0.113.2/24 dev " + hub.Outside, "addr add 203.0.113.3/24 dev " + hub.Outside,
		"-n " + web + " addr add 192.168.10.30/25 dev eth0", "-n " + web + " addr add 192.168.10.31/25 dev eth0", "-n " + web + " route add default via 192.168.10.2",
		"-n " + other + " addr add 192.168.10.40/25 dev eth0", "-n " + other + " addr add 192.168.10.3/25 dev eth0", "-n " + other + " route add default via 192.168.10.2 src 192.168.10.40",
		"-n " + outside + " addr add 203.0.113.9/24 dev eth0", "-n " + outside + " addr add 10.1.2.3/32 dev eth0", "-n " + outside + " route add 192.168.10.0/25 via 203.0.113.2",
	} {
		ip(t, line)
	}
	// The bridge is a wire here: what it carries is no business of a hub's.
	if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, device := range []string{hub.Inside, hub.Outside} {
		if _, err := nat.SetForwarding(device, true); err != nil {
			t.Fatal(err)
		}
	}
	return web, other, outside
}

// TestUntracked: the kernel keeps no connection of what asks the hub for a name or a
// lease, and one of what asks it for something else.
func TestUntracked(t *testing.T) {
	web, _, _ := plainHub(t)
	if err := nat.SetHub(hub); err != nil {
		t.Fatal(err)
	}
	for _, port := range []string{"53", "67", "5353"} {
		answer(t, "udp", "192.168.10.2:"+port)
	}
	nft(t, `table ip watch {
		chain input {
			type filter hook input priority 10
			ct state untracked udp dport 53 counter
			ct state untracked udp dport 67 counter
			ct state untracked udp dport 5353 counter
		}
		chain output {
			type filter hook output priority 10
			ct state untracked udp sport 53 counter
			ct state untracked udp sport 67 counter
			ct state untracked udp sport 5353 counter
		}
	}`)
	for _, port := range []string{"53", "67", "5353"} {
		try(t, []attempt{{web, "192.168.10.30", "udp", "192.168.10.2:" + port, true}})
	}
	got := listed(t)
	for _, want := range []string{"dport 53 counter packets 1 ", "dport 67 counter packets 1 ", "dport 5353 counter packets 0 ", "sport 53 counter packets 1 ", "sport 67 counter packets 1 ", "sport 5353 counter packets 0 "} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

// TestPublished: a port of the hub's leads to a microVM from everywhere, and opens
// nothing else.
func TestPublished(t *testing.T) {
	web, other, outside := plainHub(t)
	serve(t, web, "192.168.10.30:80")
	serve(t, web, "192.168.10.30:53")
	serve(t, web, "192.168.10.30:81")
	answer(t, "tcp", "192.168.10.2:8080") // the hub's own, on the segment
	h := hub
	h.Published = []nat.Published{
		published(t, "8080:80", "192.168.10.30"), published(t, "5353:53/udp", "192.168.10.30"), published(t, "203.0.113.3:8081:81", "192.168.10.30"),
	}
	for range 2 {
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "hub-ports.nft", "ip", nat.Table)
	const guest, machine, neighbour = "192.168.10.40", "192.168.10.3", "203.0.113.9"
	attempts := []attempt{
		{outside, neighbour, "tcp", "203.0.113.2:8080", true},
		{outside, neighbour, "tcp", "203.0.113.3:8080", true},
		{outside, neighbour, "udp", "203.0.113.2:5353", true},
		{outside, neighbour, "tcp", "203.0.113.3:8081", true},
		{outside, neighbour, "tcp", "203.0.113.2:8081", false}, // of the other address
		{outside, neighbour, "udp", "203.0.113.2:8080", false},
		{outside, neighbour, "tcp", "192.168.10.30:80", false}, // not by its own address
		{outside, neighbour, "tcp", "203.0.113.2:81", false},
		{other, guest, "tcp", "203.0.113.2:8080", true}, // back to the segment
		{other, guest, "udp", "203.0.113.2:5353", true},
		{other, machine, "tcp", "203.0.113.2:8080", true},
		{web, "192.168.10.30", "tcp", "203.0.113.2:8080", true}, // to itself
		{other, machine, "tcp", "192.168.10.2:8080", true},      // the hub's own stays that
		{"", "", "tcp", "203.0.113.2:8080", true},
		{"", "", "udp", "203.0.113.2:5353", true},
		{"", "", "tcp", "192.168.10.2:8080", true},
	}
	try(t, attempts)
	rules, err := nat.CheckHub(h)
	if err != nil || len(rules) != 2+3 || slices.ContainsFunc(rules, func(r nat.Rule) bool { return !r.Present }) {
		t.Errorf("check: %v, %v", rules, err)
	}
	const rule = "ipv4 nat PREROUTING 0 -p tcp --dport 8080 -j DNAT --to-destination 192.168.10.30:80"
	for _, broken := range []struct{ nft, want string }{
		{"delete element ip ingot ports { tcp . 8080 }", rule},
		{"delete element ip ingot ports { tcp . 8080 }; add element ip ingot ports { tcp . 8080 : 192.168.10.99 . 80 }", rule},
		{"add element ip ingot ports { tcp . 9 : 192.168.10.99 . 80 }", "set ports"},
		{"flush chain ip ingot output", "output: ports of an address, output: ports of each address outside"},
	} {
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
		nft(t, broken.nft)
		rules, err := nat.CheckHub(h)
		var missing []string
		for _, r := range rules {
			if !r.Present && r.Text != "set ports" || r.Text == broken.want {
				missing = append(missing, r.Text)
			}
		}
		if err != nil || strings.Join(missing, ", ") != broken.want {
			t.Errorf("after nft %s: %q, %v", broken.nft, missing, err)
		}
	}
	// Without publications all that is gone, but for what is the hub's own.
	if err := nat.SetHub(hub); err != nil {
		t.Fatal(err)
	}
	for i, a := range attempts {
		attempts[i].want = strings.HasPrefix(a.address, "192.168.10.2:")
	}
	try(t, attempts)
}

// conversation keeps one connection of a client outside, and asks by it again and again.
type conversation struct{ net.Conn }

func converse(t *testing.T, ns, network, address string) conversation {
	t.Helper()
	var c net.Conn
	in(t, ns, func() {
		var err error
		if c, err = net.DialTimeout(network, address, 20*time.Second); err != nil {
			t.Error(err)
		}
	})
	if c == nil {
		t.FailNow()
	}
	t.Cleanup(func() { c.Close() })
	return conversation{c}
}

// says is what comes back of a line; empty: nothing does.
func (c conversation) says(within time.Duration) string {
	c.SetDeadline(time.Now().Add(within))
	b := make([]byte, 100)
	if _, err := c.Write([]byte("?\n")); err != nil {
		return ""
	}
	n, _ := c.Read(b)
	return string(b[:n])
}

// talk answers each line with a name, by TCP and by UDP.
func talk(t *testing.T, ns, address, name string) {
	t.Helper()
	in(t, ns, func() {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		p, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { l.Close(); p.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b := make([]byte, 100)
					for {
						if _, err := c.Read(b); err != nil {
							return
						}
						fmt.Fprint(c, name)
					}
				}()
			}
		}()
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := p.ReadFrom(b)
				if err != nil {
					return
				}
				p.WriteTo([]byte(name), from)
			}
		}()
	})
}

// TestPortsChangeAlone: who talks by one port does not notice what happens to others;
// what is taken away ends, and what moves is found where it is.
func TestPortsChangeAlone(t *testing.T) {
	web, _, outside := plainHub(t)
	talk(t, web, "192.168.10.30:80", "old")
	talk(t, web, "192.168.10.31:80", "new")
	stays, moves, moved := published(t, "1000:80", "192.168.10.30"), published(t, "2000:80/udp", "192.168.10.30"), published(t, "2000:80/udp", "192.168.10.31")
	ends := published(t, "3000:80", "192.168.10.30")
	set := func(all ...nat.Published) {
		t.Helper()
		h := hub
		h.Published = all
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
	}
	set(stays, moves, ends)
	a, b, c := converse(t, outside, "tcp", "203.0.113.2:1000"), converse(t, outside, "udp", "203.0.113.2:2000"), converse(t, outside, "tcp", "203.0.113.2:3000")
	for _, one := range []conversation{a, b, c} {
		if got := one.says(20 * time.Second); got != "old" {
			t.Fatalf("at first %q answers", got)
		}
	}
	set(stays, moved)
	if err := nat.Cut([]nat.Published{moves, ends}); err != nil {
		t.Fatal(err)
	}
	if got := a.says(20 * time.Second); got != "old" {
		t.Errorf("what stays is answered by %q", got)
	}
	if got := b.says(20 * time.Second); got != "new" {
		t.Errorf("what has moved is answered by %q", got)
	}
	if got := c.says(time.Second); got != "" {
		t.Errorf("what was taken away is answered by %q", got)
	}
	for i := range 50 { // whatever else changes
		set(stays, published(t, fmt.Sprintf("%d:80", 4000+i), "192.168.10.31"))
		if got := a.says(20 * time.Second); got != "old" {
			t.Fatalf("change %d: what stays is answered by %q", i, got)
		}
	}
}

// TestManyPorts: a thousand microVMs' are a thousand elements, and no more rules.
func TestManyPorts(t *testing.T) {
	web, _, outside := plainHub(t)
	serve(t, web, "192.168.10.30:80")
	h := hub
	for i := range 2000 {
		h.Published = append(h.Published, published(t, fmt.Sprintf("%d:80", 20000+i), "192.168.10.30"))
	}
	began := time.Now()
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d ports are set in %s", len(h.Published), time.Since(began))
	try(t, []attempt{{outside, "", "tcp", "203.0.113.2:20000", true}, {outside, "", "tcp", "203.0.113.2:21999", true}, {outside, "", "tcp", "203.0.113.2:22000", false}})
	began = time.Now()
	rules, err := nat.CheckHub(h)
	if err != nil || len(rules) != 2+len(h.Published) || slices.ContainsFunc(rules, func(r nat.Rule) bool { return !r.Present }) {
		t.Errorf("check: %d rules, %v", len(rules), err)
	}
	t.Logf("and read in %s", time.Since(began))
	out, err := exec.Command("nft", "list", "table", "ip", nat.Table).Output()
	if rules := strings.Count(string(out), " comment "); err != nil || rules > 30 {
		t.Errorf("%d rules, %v", rules, err)
	}
}
