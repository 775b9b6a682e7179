package doctor_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
	"ingot/internal/lab"
)

// labMain is what a lab calls this test binary for.
func labMain(what string, args []string) error {
	switch what {
	case "hold":
		return lab.Hold(os.Stdin, os.Stdout)
	case "enter":
		return lab.Enter(args[0], args[2:])
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

// A real lab is looked at from outside: what is wrong in one of its machines is
// found there, and mended there.
func TestInALab(t *testing.T) {
	p := wired(t, false)
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

	c := l.Command(t.Context(), "host-0", self, "lab", "listen", ":9090")
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
