package firewalld_test

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/firewalld"
	"ingot/internal/firewalld/firewalldtest"
	"ingot/internal/need"
	"ingot/internal/tests"
)

func TestMain(m *testing.M) {
	tests.Apart(m, tests.Fresh("sysfs", "/sys"), tests.Fresh("tmpfs", "/run"))
}

func sh(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// The two rules of the environment's description.
const rules = "ipv4 filter FORWARD 0 -i bond0.1000 -o bond0 -j ACCEPT\nipv4 nat POSTROUTING 0 -o bond0 -j MASQUERADE\n"

var wants = firewalld.Wants{
	Rules: strings.Split(strings.TrimSpace(rules), "\n"), Trusted: []string{"bond0.1000", "vpn0"},
	Sources: []netip.Prefix{netip.MustParsePrefix("100.64.0.0/30")},
	Open:    []firewalld.Port{{Interface: "bond0", Number: 51820}},
}

// between makes this namespace one that forwards between a guest, which has a route,
// and the world, which has none back: what arrives has been masqueraded.
func between(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "ping")
	sh(t, `set -e; ip link set lo up; ip netns add guest; ip netns add world
		ip link add bond0.1000 type veth peer name eth0 netns guest; ip link add bond0 type veth peer name eth0 netns world
		ip addr add 192.168.10.2/25 dev bond0.1000; ip addr add 203.0.113.1/24 dev bond0; ip link set bond0.1000 up; ip link set bond0 up
		ip -n guest addr add 192.168.10.26/25 dev eth0; ip -n guest link set eth0 up; ip -n guest route add default via 192.168.10.2
		ip -n world addr add 203.0.113.2/24 dev eth0; ip -n world link set eth0 up
		echo 1 >/proc/sys/net/ipv4/conf/bond0/forwarding; echo 1 >/proc/sys/net/ipv4/conf/bond0.1000/forwarding`)
	t.Cleanup(func() {
		sh(t, "ip link del bond0; ip link del bond0.1000; ip netns del guest; ip netns del world; nft flush ruleset")
	})
}

// passes says whether a guest reaches the world.
func passes() bool {
	return exec.Command("ip", "netns", "exec", "guest", "ping", "-c", "1", "-W", "1", "203.0.113.2").Run() == nil
}

func told(t *testing.T, d *firewalldtest.Daemon, want string) {
	t.Helper()
	if diff := cmp.Diff(want, d.Cmd("--direct", "--get-all-rules")); diff != "" {
		t.Errorf("direct rules: %s", diff)
	}
}

func TestWithoutBus(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	changed, err := firewalld.Set(t.Context(), wants)
	missing, err2 := firewalld.Missing(t.Context(), wants)
	if changed || err != nil || err2 != nil || len(missing) > 0 || firewalld.Withdraw(t.Context(), wants) != nil || firewalld.Running(t.Context()) {
		t.Errorf("without a bus: changed %v, %v; missing %q, %v", changed, err, missing, err2)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var log bytes.Buffer
	if err := firewalld.Keep(ctx, wants, nil, slog.New(slog.NewTextHandler(&log, nil))); err != nil || log.Len() > 0 {
		t.Errorf("Keep: %v, %s", err, log.String())
	}
}

// TestKeep has packets pass a real firewalld for as long as they are to, however often
// it forgets, and leaves it as it was.
func TestKeep(t *testing.T) {
	for _, line := range []string{"FirewallBackend=nftables", "FirewallBackend=iptables", "FlushAllOnReload=no"} {
		t.Run(line, func(t *testing.T) { testKeep(t, line) })
	}
}

func testKeep(t *testing.T, line string) {
	between(t)
	d := firewalldtest.New(t)
	d.Set(line)
	before := d.Files()
	ctx, cancel := context.WithCancel(t.Context())
	kept := make(chan error, 1)
	go func() { kept <- firewalld.Keep(ctx, wants, nil, slog.New(slog.NewTextHandler(t.Output(), nil))) }()
	defer func() { cancel(); <-kept }()

	d.Start() // later than we
	tests.Await(t, 20*time.Second, "packets to pass", passes)
	told(t, d, rules)
	missing, err := firewalld.Missing(t.Context(), wants)
	if err != nil || len(missing) > 0 {
		t.Errorf("missing %q, %v", missing, err)
	}
	if changed, err := firewalld.Set(t.Context(), wants); changed || err != nil {
		t.Errorf("again: changed %v, %v", changed, err)
	}
	for _, ask := range [][]string{
		{"--zone=trusted", "--query-interface=bond0.1000"}, {"--zone=trusted", "--query-interface=vpn0"},
		{"--zone=trusted", "--query-source=100.64.0.0/30"}, {"--query-port=51820/udp"},
	} {
		d.Cmd(ask...)
	}
	for range 3 {
		d.Cmd("--reload")
		tests.Await(t, 20*time.Second, "packets to pass after a reload", func() bool { return passes() && d.Cmd("--direct", "--get-all-rules") == rules })
	}
	d.Stop()
	if changed, err := firewalld.Set(t.Context(), wants); changed || err != nil {
		t.Errorf("without firewalld: changed %v, %v", changed, err)
	}
	d.Start()
	tests.Await(t, 20*time.Second, "packets to pass after a restart", func() bool { return passes() && d.Cmd("--direct", "--get-all-rules") == rules })

	cancel()
	if err := <-kept; err != nil {
		t.Error(err)
	}
	kept <- nil
	if err := firewalld.Withdraw(t.Context(), wants); err != nil {
		t.Fatal(err)
	}
	told(t, d, "")
	if passes() {
		t.Error("packets pass after Withdraw")
	}
	if zones := d.Cmd("--list-all-zones"); strings.Contains(zones, "bond0.1000") || strings.Contains(zones, "vpn0") || strings.Contains(zones, "100.64") || strings.Contains(zones, "51820") {
		t.Errorf("zones after Withdraw:\n%s", zones)
	}
	if err := firewalld.Withdraw(t.Context(), wants); err != nil {
		t.Errorf("again: %v", err)
	}
	if diff := cmp.Diff(before, d.Files()); diff != "" {
		t.Errorf("firewalld's files: %s", diff)
	}
}

// Direct rules accept nothing: what the trusted zone is for.
func TestDirectRulesAreNotEnough(t *testing.T) {
	between(t)
	d := firewalldtest.New(t)
	if !passes() {
		sh(t, "nft 'add table ip mine; add chain ip mine p { type nat hook postrouting priority 100; }; add rule ip mine p oifname bond0 masquerade'")
	}
	if !passes() {
		t.Fatal("nothing passes without firewalld")
	}
	d.Start()
	if passes() {
		t.Error("firewalld lets packets pass that nobody asked it to")
	}
	if _, err := firewalld.Set(t.Context(), firewalld.Wants{Rules: wants.Rules}); err != nil {
		t.Fatal(err)
	}
	told(t, d, rules)
	if passes() {
		t.Error("direct rules are enough for firewalld: there is no need of the zone")
	}
	if _, err := firewalld.Set(t.Context(), wants); err != nil {
		t.Fatal(err)
	}
	if !passes() { // masqueraded twice
		t.Error("packets don't pass")
	}
}

// What is there for good is its owner's, and so is a zone that somebody has chosen.
func TestOwners(t *testing.T) {
	between(t)
	d := firewalldtest.New(t)
	d.Start()
	for _, rule := range wants.Rules {
		d.Cmd(append([]string{"--permanent", "--direct", "--add-rule"}, strings.Fields(rule)...)...)
	}
	d.Cmd("--permanent", "--zone=trusted", "--add-interface=bond0.1000")
	d.Cmd("--permanent", "--zone=trusted", "--add-source=100.64.0.0/30")
	d.Cmd("--permanent", "--add-port=51820/udp")
	d.Cmd("--reload")
	d.Cmd("--zone=internal", "--add-interface=vpn0")
	before, zones := d.Files(), d.Cmd("--list-all-zones")

	_, err := firewalld.Set(t.Context(), wants)
	const refused = "vpn0 in zone trusted (firewall-cmd --zone=trusted --change-interface=vpn0): firewalld: it is in zone internal by somebody's choice, and stays there"
	if err == nil || err.Error() != refused {
		t.Errorf("Set: %v, want %s", err, refused)
	}
	missing, err := firewalld.Missing(t.Context(), wants)
	if diff := cmp.Diff([]string{"vpn0 in zone trusted (firewall-cmd --zone=trusted --change-interface=vpn0)"}, missing); diff != "" || err != nil {
		t.Errorf("missing: %v %s", err, diff)
	}
	if err := firewalld.Withdraw(t.Context(), wants); err != nil {
		t.Fatal(err)
	}
	told(t, d, rules)
	if diff := cmp.Diff(zones, d.Cmd("--list-all-zones")); diff != "" {
		t.Errorf("zones: %s", diff)
	}
	if diff := cmp.Diff(before, d.Files()); diff != "" {
		t.Errorf("firewalld's files: %s", diff)
	}
	if !passes() {
		t.Error("what its owner lets pass does not")
	}
}
