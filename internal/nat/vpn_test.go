package nat_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/nat"
)

func hubWithVPN() nat.Hub {
	h := hub
	h.VPN = nat.VPN{Interface: "vpn0", Subnet: netip.MustParsePrefix("10.91.0.0/24"), Port: 51820}
	return h
}

func TestVPNGoldens(t *testing.T) {
	needs(t)
	if err := nat.SetHub(hubWithVPN()); err != nil {
		t.Fatal(err)
	}
	golden(t, "hub-vpn.nft", "ip", nat.Table)
	tailnet := hub
	tailnet.Tailnet = nat.VPN{Interface: "tailscale0", Subnet: netip.MustParsePrefix("100.64.0.0/10"), Port: 41641}
	if err := nat.SetHub(tailnet); err != nil {
		t.Fatal(err)
	}
	golden(t, "hub-tailnet.nft", "ip", nat.Table)
	if err := nat.SetHub(hub); err != nil {
		t.Fatal(err)
	}
	golden(t, "hub.nft", "ip", nat.Table)
	h := exampleHost()
	h.Peers = netip.MustParsePrefix("10.91.0.0/24")
	if _, err := nat.OpenGuard(h); err != nil {
		t.Fatal(err)
	}
	golden(t, "host-vpn.nft", "inet", nat.Table)
}

// TestPeers: who reaches whom by the VPN's interface, for which a veth stands here. What
// is encrypted is not this package's affair.
func TestPeers(t *testing.T) {
	needs(t)
	nft(t, "flush ruleset")
	ip(t, "link set lo up")
	inside, outside, peers := wire(t, hub.Inside), wire(t, hub.Outside), wire(t, "vpn0")
	for _, line := range []string{
		"addr add 192.168.10.2/25 dev " + hub.Inside, "addr add 203.0.113.2/24 dev " + hub.Outside, "addr add 10.91.0.1/24 dev vpn0",
		"-n " + inside + " addr add 192.168.10.30/25 dev eth0", "-n " + inside + " route add default via 192.168.10.2",
		"-n " + outside + " addr add 203.0.113.9/24 dev eth0", "-n " + outside + " addr add 10.91.0.7/32 dev eth0", "-n " + outside + " route add 192.168.10.0/25 via 203.0.113.2",
		"-n " + peers + " addr add 10.91.0.2/32 dev eth0", "-n " + peers + " addr add 192.168.77.7/32 dev eth0",
		"-n " + peers + " route add 10.91.0.1/32 dev eth0", "-n " + peers + " route add default via 10.91.0.1 src 10.91.0.2",
	} {
		ip(t, line)
	}
	for _, device := range []string{hub.Inside, hub.Outside, "vpn0"} {
		if _, err := nat.SetForwarding(device, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, address := range []string{"192.168.10.2:9091", "192.168.10.2:5000", "203.0.113.2:22"} {
		answer(t, "tcp", address)
	}
	answer(t, "udp", "192.168.10.2:53")
	answer(t, "udp", "0.0.0.0:51820")
	serve(t, inside, "192.168.10.30:80")
	serve(t, outside, "203.0.113.9:80")
	serve(t, peers, "10.91.0.2:80")
	const peer, guest = "10.91.0.2", "192.168.10.30"
	whole := func(vpn bool) []attempt {
		return []attempt{
			{peers, peer, "tcp", "192.168.10.30:80", vpn},
			{peers, peer, "tcp", "192.168.10.2:9091", vpn},
			{peers, peer, "tcp", "192.168.10.2:5000", vpn},
			{peers, peer, "udp", "192.168.10.2:53", vpn},
			{peers, peer, "tcp", "203.0.113.9:80", false}, // the world: a peer has its own way
			{peers, "192.168.77.7", "tcp", "192.168.10.30:80", false},
			{inside, guest, "tcp", "10.91.0.2:80", false},
			{inside, guest, "udp", "192.168.10.2:51820", !vpn}, // whose it is then is the hub's affair
			{inside, guest, "tcp", "203.0.113.9:80", true},
			{outside, "203.0.113.9", "udp", "203.0.113.2:51820", true},
			{outside, "10.91.0.7", "tcp", "192.168.10.30:80", false}, // in a peer's name
			{outside, "203.0.113.9", "tcp", "192.168.10.30:80", false},
		}
	}
	for _, vpn := range []bool{true, false} {
		h := hubWithVPN()
		if !vpn {
			h = hub
		}
		if err := nat.SetHub(h); err != nil {
			t.Fatal(err)
		}
		try(t, whole(vpn))
	}
}

// TestPublic: a lab's machine passes on what comes to the hub's port, from outside only.
func TestPublic(t *testing.T) {
	needs(t)
	nft(t, "flush ruleset")
	ip(t, "link set lo up")
	l := nat.Lab{
		Table: "ingot-test", Uplink: "ingot-test", Subnet: netip.MustParsePrefix("100.64.0.0/30"),
		Public: 51820, Hub: netip.MustParseAddr("100.64.0.2"),
	}
	hub, outside := wire(t, l.Uplink), wire(t, "lan")
	for _, line := range []string{
		"addr add 100.64.0.1/30 dev " + l.Uplink, "addr add 203.0.113.1/24 dev lan", "-n " + outside + " addr add 203.0.113.9/24 dev eth0",
		"-n " + hub + " addr add 100.64.0.2/30 dev eth0", "-n " + hub + " route add default via 100.64.0.1", "-n " + outside + " route add 100.64.0.0/30 via 203.0.113.1",
	} {
		ip(t, line)
	}
	for _, device := range []string{l.Uplink, "lan"} {
		if _, err := nat.SetForwarding(device, true); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, hub, "100.64.0.2:51820")
	serve(t, hub, "100.64.0.2:53")
	for range 2 {
		if err := nat.SetLab(l); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "lab-vpn.nft", "ip", "ingot-test")
	try(t, []attempt{
		{outside, "", "udp", "203.0.113.1:51820", true},
		{outside, "", "udp", "203.0.113.1:53", false},
		{outside, "", "tcp", "203.0.113.1:51820", false},
		{outside, "", "udp", "100.64.0.2:53", false},
		{hub, "", "udp", "203.0.113.1:51820", false},
	})
	// Another port, or none, is another set of rules.
	if missing, err := nat.CheckLab(l); err != nil || len(missing) > 0 {
		t.Errorf("missing %v, %v", missing, err)
	}
	other := l
	other.Public = 51821
	if missing, err := nat.CheckLab(other); err != nil || !cmp.Equal(missing, []string{"forward: udp 51821 is the hub's", "public: udp 51821 is the hub's"}) {
		t.Errorf("of another port: %q, %v", missing, err)
	}
	other.Public = 0
	if missing, err := nat.CheckLab(other); err != nil || len(missing) != 1 {
		t.Errorf("without the port: %q, %v", missing, err)
	}
	if err := nat.SetLab(other); err != nil {
		t.Fatal(err)
	}
	golden(t, "lab.nft", "ip", "ingot-test")
	try(t, []attempt{{outside, "", "udp", "203.0.113.1:51820", false}})
}

// serve answers in a namespace, by TCP and UDP, until the test ends.
func serve(t *testing.T, ns, address string) {
	t.Helper()
	in(t, ns, func() {
		answer(t, "tcp", address)
		answer(t, "udp", address)
	})
}
