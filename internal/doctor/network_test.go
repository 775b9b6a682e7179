package doctor_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/dhcp"
	"ingot/internal/doctor"
	"ingot/internal/link"
	"ingot/internal/need"
)

// wired makes an uplink with a default route, and a lab's device if it is to run.
func wired(t *testing.T, running bool) doctor.Patient {
	t.Helper()
	needs(t)
	sh(t, "ip link add up0 type bridge; ip addr add 203.0.113.2/24 dev up0; ip link set up0 up; ip route add default via 203.0.113.1")
	t.Cleanup(func() { sh(t, "ip link del up0") })
	if running {
		sh(t, "ip link add ingot-t type bridge; ip link set ingot-t up")
		t.Cleanup(func() { sh(t, "ip link del ingot-t") })
	}
	return doctor.Patient{Device: "ingot-t"}
}

func TestForwarding(t *testing.T) {
	needs(t)
	expect(t, "forwarding", doctor.Patient{Device: "ingot-t"}, doctor.Warn, "no default route")
	p := wired(t, true)
	sh(t, "echo 0 >/proc/sys/net/ipv4/conf/up0/forwarding; echo 0 >/proc/sys/net/ipv4/conf/ingot-t/forwarding")
	f := expect(t, "forwarding", p, doctor.Warn, "off for up0, ingot-t")
	if want := "sysctl net.ipv4.conf.up0.forwarding=1 net.ipv4.conf.ingot-t.forwarding=1"; f.Fix != want {
		t.Errorf("fix: %s; want %s", f.Fix, want)
	}
	mend(t, f, p)
	sh(t, f.Fix) // what is said is what can be typed

	mount(t, "/proc/sys", "/proc/sys", "", unix.MS_BIND|unix.MS_REC, "")
	if err := unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	expect(t, "forwarding", p, doctor.Fail, "/proc/sys is read-only")
}

func TestForwardingBeforeUp(t *testing.T) {
	p := wired(t, false)
	sh(t, "echo 0 >/proc/sys/net/ipv4/conf/up0/forwarding")
	expect(t, "forwarding", p, doctor.Pass, "`ingot up` switches it on for up0")
}

func TestFirewall(t *testing.T) {
	need.Binary(t, "nft")
	nft := func(rules string) {
		t.Helper()
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader("flush ruleset\n" + rules)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	const byPolicy = "table ip filter {\nchain DOCKER {\n}\nchain FORWARD {\ntype filter hook forward priority 0; policy drop\n}\n}\n"
	const byRule = "table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0\nct state established accept\nreject\n}\n}\n"
	t.Run("before up", func(t *testing.T) {
		p := wired(t, false)
		expect(t, "firewall", p, doctor.Pass, "no chain")
		nft(byPolicy)
		expect(t, "firewall", p, doctor.Pass, "lets itself pass Docker's ip filter FORWARD")
		nft(byRule)
		mend(t, expect(t, "firewall", p, doctor.Warn, "dropped by ip filter FORWARD (reject in FORWARD)"), p)
	})
	t.Run("running", func(t *testing.T) {
		p := wired(t, true)
		nft(byPolicy)
		f := expect(t, "firewall", p, doctor.Warn, "dropped by Docker's ip filter FORWARD (policy drop)")
		mend(t, f, p)
		nft(byPolicy)
		sh(t, f.Fix)
		expect(t, "firewall", p, doctor.Pass, "no chain")
	})
	sh(t, "nft flush ruleset")
}

func TestSubnets(t *testing.T) {
	p := wired(t, false)
	p.Networks = []netip.Prefix{netip.MustParsePrefix("192.168.10.0/25"), netip.MustParsePrefix("100.64.0.0/30")}
	expect(t, "subnets", p, doctor.Pass, "192.168.10.0/25 is free, 100.64.0.0/30 is free")
	sh(t, "ip link add vpn0 type bridge; ip link set vpn0 up; ip route add 192.168.0.0/20 dev vpn0")
	t.Cleanup(func() { sh(t, "ip link del vpn0") })
	expect(t, "subnets", p, doctor.Pass, "192.168.10.0/25 is taken: `ingot up` takes 192.168.16.0/25")
	p.Exists = true
	expect(t, "subnets", p, doctor.Warn, "route to 192.168.0.0/20 by vpn0 overlaps")
	p.Others = []string{"vpn0"}
	expect(t, "subnets", p, doctor.Pass, "the environment's alone")
	p.Exists, p.Others = false, nil
	sh(t, "ip route add 192.168.0.0/16 dev vpn0")
	expect(t, "subnets", p, doctor.Fail, "find a free subnet like 192.168.10.0/25")
}

// here is a machine of an environment that is this network namespace.
func here(f func() error) error { return f() }

func TestPorts(t *testing.T) {
	needs(t)
	sh(t, "ip link set lo up")
	expect(t, "ports", doctor.Patient{}, doctor.Pass, "have their own")
	p := doctor.Patient{Machines: []doctor.Machine{{
		Name: "host-0", Inside: here, Ports: []doctor.Port{{Protocol: "tcp", Number: 9090}, {Protocol: "udp", Number: 67}},
	}}}
	expect(t, "ports", p, doctor.Pass, "nobody else listens")
	tcp, err := net.Listen("tcp", "127.0.0.1:9090")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", ":67")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	f := expect(t, "ports", p, doctor.Fail, fmt.Sprintf("port 67/udp of host-0 is held by exe (pid %d)", os.Getpid()))
	if f.Fixable || !strings.Contains(f.Detail, "port 9090/tcp of host-0 is held by exe (pid ") {
		t.Errorf("%+v", f)
	}
	p.Machines[0].Roles = [][]string{{"hub"}, os.Args[1:]} // it is a role
	expect(t, "ports", p, doctor.Pass, "nobody else listens")
}

// A server of ours, at the other end of the segment, is foreign to the hub.
func TestDHCP(t *testing.T) {
	needs(t)
	expect(t, "dhcp", doctor.Patient{}, doctor.Skip, "no segment")
	sh(t, "ip netns add hub; ip link add far0 type veth peer name seg0 netns hub; ip addr add 192.168.10.9/25 dev far0; ip link set far0 up; ip -n hub link set seg0 up")
	t.Cleanup(func() { sh(t, "ip link del far0; ip netns del hub") })
	pin := t.TempDir()
	if err := os.Symlink("/run/netns/hub", filepath.Join(pin, "net")); err != nil {
		t.Fatal(err)
	}
	ns, err := link.OpenNamespace(pin)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	p := doctor.Patient{Machines: []doctor.Machine{{
		Name: "network-hub", Hub: true, Address: netip.MustParseAddr("192.168.10.2"), Segment: "seg0", Inside: ns.Do,
	}}}
	expect(t, "dhcp", p, doctor.Pass, "the only server")

	dir := t.TempDir()
	s, err := dhcp.New(dhcp.Config{
		Interface: "far0", Server: netip.MustParseAddr("192.168.10.9"), Authoritative: true,
		Subnets: []dhcp.Subnet{{
			Prefix: netip.MustParsePrefix("192.168.10.0/25"),
			Ranges: []dhcp.Range{{First: netip.MustParseAddr("192.168.10.100"), Last: netip.MustParseAddr("192.168.10.110")}},
		}},
		LeaseFile: filepath.Join(dir, "leases"), ConfigFile: filepath.Join(dir, "conf"), DefaultsFile: filepath.Join(dir, "defaults"),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-s.Ready():
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	expect(t, "dhcp", p, doctor.Warn, "another DHCP server is on the segment: 192.168.10.9 at ")
	expect(t, "dhcp", p, doctor.Warn, " offers 192.168.10.1")
}

func TestBridges(t *testing.T) {
	needs(t)
	const hook = "/proc/sys/net/bridge/bridge-nf-call-iptables"
	need.BridgeFilter(t)
	p := doctor.Patient{Machines: []doctor.Machine{{Name: "host-0", Inside: here}}}
	sh(t, "echo 1 >"+hook)
	mend(t, expect(t, "bridges", p, doctor.Warn, "br_netfilter is on in host-0"), p)
}
