package nat_test

import (
	"fmt"
	"net/netip"
	"os/exec"
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

func restricted(t *testing.T, guest string, rules ...string) nat.Restricted {
	t.Helper()
	e, err := nat.ParseEgress(rules)
	if err != nil {
		t.Fatal(err)
	}
	return nat.Restricted{Guest: netip.MustParseAddr(guest), Egress: e}
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
	const first, second, free = "192.168.10.30", "192.168.10.31", "192.168.10.40"
	h := hub
	h.Published = []nat.Published{published(t, "8080:80", first)}
	h.Restricted = []nat.Restricted{
		restricted(t, first, "allow 10.1.2.3 443/tcp", "deny private"),
		restricted(t, second, "allow 203.0.113.0/24 80-90/tcp", "deny all"),
	}
	for range 2 {
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "hub-egress.nft", "ip", nat.Table)
	// Two that claim one address don't keep the rules of all others back.
	twice := h
	twice.Restricted = append(slices.Clone(h.Restricted), restricted(t, second, "deny private"))
	for _, x := range []nat.Hub{twice, h} {
		if err := nat.SetHub(x); err != nil {
			t.Fatal(err)
		}
	}
	attempts := []attempt{
		{web, first, "tcp", "203.0.113.9:80", true}, {web, first, "udp", "203.0.113.9:80", true}, {web, first, "tcp", "10.1.2.3:443", true},
		{web, first, "tcp", "10.1.2.3:80", false}, {web, first, "udp", "10.1.2.3:443", false},
		{web, second, "tcp", "203.0.113.9:80", true}, {web, second, "tcp", "203.0.113.9:443", false},
		{web, second, "udp", "203.0.113.9:80", false}, {web, second, "tcp", "10.1.2.3:443", false},
		{other, free, "tcp", "10.1.2.3:80", true}, {other, free, "tcp", "203.0.113.9:443", true},
		{web, second, "tcp", "192.168.10.40:80", true}, {web, second, "tcp", "192.168.10.2:53", true}, // the segment is none of it
	}
	try(t, attempts)
	// Who comes in by a port is answered, also by a guest that may open nothing.
	h.Restricted[0] = restricted(t, first, "deny all")
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
		"delete element ip ingot egress { 192.168.10.31 }":                                                                "ipv4 filter FORWARD 0 -s 192.168.10.31 -j egress-2",
		"delete element ip ingot egress { 192.168.10.31 }; add element ip ingot egress { 192.168.10.31 : jump egress-1 }": "ipv4 filter FORWARD 0 -s 192.168.10.31 -j egress-2",
		"flush chain ip ingot egress-1":                                                                                   "egress-1: 1: deny all",
		"insert rule ip ingot egress-1 accept":                                                                            "chain egress-1 as it was made, with no other rules",
		"add element ip ingot egress { 1.2.3.4 : accept }":                                                                "set egress",
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
	a := converse(t, web, "tcp", "203.0.113.9:80")
	ask := func(want string, rules ...string) {
		t.Helper()
		h.Restricted = nil
		if len(rules) > 0 {
			h.Restricted = []nat.Restricted{restricted(t, "192.168.10.30", rules...)}
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

// TestManyRestricted: microVMs with one policy share its chain.
func TestManyRestricted(t *testing.T) {
	plainHub(t)
	h := hub
	for i := range 1000 {
		h.Restricted = append(h.Restricted, restricted(t, fmt.Sprintf("10.7.%d.%d", i/250, i%250), "deny private", fmt.Sprintf("deny all %d/tcp", 1+i%3)))
	}
	began := time.Now()
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	t.Logf("set in %s", time.Since(began))
	out, err := exec.Command("nft", "list", "table", "ip", nat.Table).Output()
	if n := strings.Count(string(out), "chain egress-"); err != nil || n != 3 {
		t.Errorf("%d chains, %v", n, err)
	}
	if rules, err := nat.CheckHub(h); err != nil || len(rules) != 1002 || slices.ContainsFunc(rules, func(r nat.Rule) bool { return !r.Present }) {
		t.Errorf("check: %d rules, %v", len(rules), err)
	}
}
