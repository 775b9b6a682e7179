package doctor_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
	"ingot/internal/firewalld/firewalldtest"
	"ingot/internal/lab"
	"ingot/internal/need"
)

// labMain is what a lab calls this test binary for.
func labMain(what string, args []string) error {
	switch what {
	case "hold":
		return lab.Hold(os.Stdin, os.Stdout)
	case "enter":
		return lab.Enter(args[0], args[2:])
	case "supervise":
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		defer stop()
		return lab.Supervise(ctx, args[0], os.Stdin, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case "listen": // until its standard input ends
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Println("listening")
		bufio.NewReader(os.Stdin).ReadByte()
		return nil
	}
	return fmt.Errorf("unknown: %s", what)
}

// inALab makes a real lab.
func inALab(t *testing.T) *lab.Lab {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr
	l := lab.New(lab.Config{
		Name: "t", Dir: t.TempDir(), RunDir: "/run/lab/t", Binary: self,
		Subnet: netip.MustParsePrefix("192.168.77.0/25"), Uplink: netip.MustParsePrefix("100.64.40.0/30"),
		Machines: []lab.Machine{{Name: "network-hub", Address: a("192.168.77.2"), Hub: true}, {Name: "host-0", Address: a("192.168.77.3"), Host: true}},
	})
	t.Cleanup(func() {
		if err := l.Remove(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	_, err = l.Ensure(t.Context())
	for range 20 {
		// Since Linux 6.18 a namespace's number comes from its CPU's batch, and one that
		// is lower than this process's own can't be pinned: fs/namespace.c, mnt_ns_loop.
		// It matters only where this is not the first mount namespace, as here.
		if !errors.Is(err, unix.EINVAL) {
			break
		}
		_, err = l.Ensure(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A real lab is looked at from outside: what is wrong in one of its machines is
// found there, and mended there.
func TestInALab(t *testing.T) {
	p := wired(t, false)
	l := inALab(t)
	p.Exists, p.Device, p.Networks = true, l.Device(), []netip.Prefix{l.Subnet, l.Uplink}
	for _, m := range l.Machines {
		p.Machines = append(p.Machines, doctor.Machine{
			Name: m.Name, Hub: m.Hub, Address: m.Address, Segment: lab.Segment, Roles: [][]string{{"host"}},
			Ports:  []doctor.Port{{Protocol: "tcp", Number: 9090}},
			Inside: func(f func() error) error { return l.Inside(m.Name, f) },
		})
	}
	p.Dir = l.Dir
	expect(t, "forwarding", p, doctor.Pass, "on for up0, ingot-t")
	expect(t, "subnets", p, doctor.Pass, "192.168.77.0/25 is the environment's alone")
	expect(t, "firewall", p, doctor.Pass, "no chain")
	expect(t, "bridges", p, doctor.Pass, "no rules")
	expect(t, "dhcp", p, doctor.Pass, "only server")
	expect(t, "loop", p, doctor.Pass, "")
	expect(t, "ports", p, doctor.Pass, "nobody else")

	sh(t, "echo 0 >/proc/sys/net/ipv4/conf/ingot-t/forwarding")
	mend(t, expect(t, "forwarding", p, doctor.Warn, "off for ingot-t"), p)

	if _, err := os.Stat("/proc/sys/net/bridge"); err == nil {
		if err := l.Inside("host-0", func() error { return os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("1"), 0) }); err != nil {
			t.Fatal(err)
		}
		mend(t, expect(t, "bridges", p, doctor.Warn, "br_netfilter is on in host-0"), p)
	}

	c := l.Command(t.Context(), "host-0", l.Binary, "lab", "listen", ":9090")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); c.Wait() }()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	expect(t, "ports", p, doctor.Fail, fmt.Sprintf("port 9090/tcp of host-0 is held by doctor.test (pid %d)", c.Process.Pid))
	p.Machines[1].Roles = [][]string{{"lab", "listen", ":9090"}}
	expect(t, "ports", p, doctor.Pass, "nobody else")
}

// TestFirewalldBeneathALab has a lab on a machine with a real firewalld, which drops
// its packets until it is told, and whenever it has forgotten.
func TestFirewalldBeneathALab(t *testing.T) {
	need.Binary(t, "ping")
	p := wired(t, false)
	sh(t, `set -e; ip netns add world; ip link add port type veth peer name eth0 netns world; ip link set port master up0 up
		ip -n world addr add 203.0.113.1/24 dev eth0; ip -n world link set eth0 up`)
	t.Cleanup(func() { sh(t, "ip netns del world") })
	d := firewalldtest.New(t)
	d.Start()
	files := d.Files()
	expect(t, "firewall", p, doctor.Pass, "`ingot up` lets itself pass firewalld's inet firewalld filter_FORWARD")
	l := inALab(t)
	passes := func() bool {
		return l.Command(t.Context(), "network-hub", "ping", "-c", "1", "-W", "1", "203.0.113.1").Run() == nil
	}
	f := expect(t, "firewall", p, doctor.Warn, "dropped by firewalld's inet firewalld filter_FORWARD (reject in ")
	if want := "firewall-cmd --zone=trusted --change-interface=ingot-t"; f.Fix != want || passes() {
		t.Errorf("packets pass: %v; fix: %s, want %s", passes(), f.Fix, want)
	}
	mend(t, f, p)
	if !passes() {
		t.Error("packets don't pass")
	}
	d.Cmd("--reload")
	if err := l.TellFirewalld(t.Context()); err != nil || !passes() {
		t.Errorf("told by `ingot up`: %v, packets pass: %v", err, passes())
	}
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, how := range []func(){func() { d.Cmd("--reload") }, func() { d.Stop(); d.Start() }} {
		how()
		for tries := 0; !passes(); tries++ {
			if tries == 20 {
				t.Fatal("the supervisor does not tell firewalld again")
			}
		}
	}
	if got := d.Cmd("--direct", "--get-all-rules"); got != "" { // those are the hub's affair, in its own machine
		t.Errorf("direct rules: %s", got)
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if zones := d.Cmd("--list-all-zones"); strings.Contains(zones, "ingot-t") {
		t.Errorf("left after the lab: %s", zones)
	}
	if diff := cmp.Diff(files, d.Files()); diff != "" {
		t.Errorf("firewalld's files: %s", diff)
	}
}
