package dhcp

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/need"
)

// A machine that took an address by hand keeps it.
func TestAddressInUseIsNotOffered(t *testing.T) {
	segment(t)
	sh(t, "ip -n client addr add 192.168.10.26/25 dev cli")
	c := config(t)
	c.Now = nil
	s, _ := start(t, c)
	if got := ack(t, s, 1); got != "192.168.10.27" {
		t.Errorf("got %s", got)
	}
	if l := s.Leases()[0]; l.IP != a("192.168.10.26") || l.State != Declined || l.MAC.String() != cardOf(t, "cli").String() {
		t.Errorf("got %+v", l)
	}
	if f := s.Facts(); f.Conflicts != 1 {
		t.Errorf("counted %+v", f.Counters)
	}
}

// Whoever begins to use a free address is heard, without being asked.
func TestARPIsHeard(t *testing.T) {
	need.Binary(t, "busybox")
	segment(t)
	s, _ := start(t, config(t))
	sh(t, "ip -n client addr add 192.168.10.30/25 dev cli && "+in+"busybox arping -U -c 1 -I cli 192.168.10.30 >/dev/null || true")
	eventually(t, "it is put aside", func() bool { return s.Facts().Conflicts == 1 })
	if got := ack(t, s, 1, want("192.168.10.30")); got == "192.168.10.30" {
		t.Error("it was given")
	}
	// Whoever knows that it is free takes it back.
	sh(t, "ip -n client addr del 192.168.10.30/25 dev cli")
	if err := s.Release(a("192.168.10.30")); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(a("192.168.10.30")); !errdefs.IsNotFound(err) {
		t.Errorf("released twice: %v", err)
	}
	if got := ack(t, s, 2, want("192.168.10.30")); got != "192.168.10.30" {
		t.Errorf("once it is released, got %s", got)
	}
}

func TestProbedAddressesComeFirstAndNoneIsLost(t *testing.T) {
	s, now := table(t, func(c *Config) { last(c, "192.168.10.30") })
	p := s.pool(s.own)
	s.candidates(p) // .26 to .30 are being probed
	s.seen(from(a("192.168.10.27")), [6]byte(mac(0x77)))
	if got := ack(t, s, 1); got != "192.168.10.26" {
		t.Errorf("while ARP looks, got %q", got)
	}
	s.settle(p)
	got := []string{ack(t, s, 2), ack(t, s, 3), ack(t, s, 4), ack(t, s, 5)}
	if want := "192.168.10.28 192.168.10.29 192.168.10.30 "; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
	*now = now.Add(time.Hour)
	s.candidates(p)
	s.settle(p)
	s.seen(from(a("192.168.10.29")), [6]byte(mac(3))) // it goes on without a lease
	given := map[string]bool{}
	for n := range byte(6) {
		given[ack(t, s, 0x40+n)] = true
	}
	if len(given) != 5 || given["192.168.10.29"] {
		t.Errorf("of five addresses, one in use, got %v", given)
	}
	if got := ack(t, s, 3); got != "192.168.10.29" {
		t.Errorf("whoever uses it got %q", got)
	}
}

// isc-dhcp-server's place is taken by a second server of ours, which is foreign
// to the first.
func TestForeignServerIsSeen(t *testing.T) {
	segment(t)
	sh(t, "ip -n client addr add 192.168.10.9/25 dev cli")
	other := background(t, in+serverLine(t, "cli", "192.168.10.9", "192.168.10.0/25", "192.168.10.100", "192.168.10.110", filepath.Join(t.TempDir(), "leases")))
	eventually(t, "the other serves", func() bool { return strings.Contains(other.String(), "serving") })
	s, _ := start(t, config(t))
	f := s.Facts().Foreign
	if len(f) != 1 || f[0].Server != a("192.168.10.9") || f[0].Offers != a("192.168.10.100") || f[0].MAC.String() != cardOf(t, "cli").String() {
		t.Errorf("as the server began to answer, it knew of %+v", f)
	}
}

// The interface is down when the server begins: it asks again soon after.
func TestForeignServerIsSeenOnceTheInterfaceIsUp(t *testing.T) {
	segment(t)
	sh(t, "ip -n client addr add 192.168.10.9/25 dev cli; ip link set srv down")
	s, _ := start(t, config(t))
	sh(t, "ip link set srv up")
	other := background(t, in+serverLine(t, "cli", "192.168.10.9", "192.168.10.0/25", "192.168.10.100", "192.168.10.110", filepath.Join(t.TempDir(), "leases")))
	eventually(t, "the other serves", func() bool { return strings.Contains(other.String(), "serving") })
	eventually(t, "it is seen", func() bool { return len(s.Facts().Foreign) == 1 })
}

// isc-dhcp-server, as it is: it looks for a second before it offers.
func TestRealForeignServerIsSeen(t *testing.T) {
	need.Binary(t, "dhcpd")
	segment(t)
	sh(t, "ip -n client addr add 192.168.10.9/25 dev cli")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "leases"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	out := background(t, fmt.Sprintf("%s dhcpd -4 -d -f -cf %[2]s/conf -lf %[2]s/leases -pf %[2]s/pid cli", in, dir))
	eventually(t, "dhcpd serves", func() bool { return strings.Contains(out.String(), "Server starting service") })
	s, _ := start(t, config(t))
	if f := s.Facts().Foreign; len(f) != 1 || f[0].Server != a("192.168.10.9") {
		t.Errorf("as the server began to answer, it knew of %+v\n%s", f, out)
	}
	eventually(t, "what it offers is heard", func() bool { return s.Facts().Foreign[0].Offers.IsValid() })
}

func TestNoForeignServerIsSeenWhereThereIsNone(t *testing.T) {
	segment(t)
	c := config(t)
	s, stop := start(t, c)
	if f := s.Facts().Foreign; len(f) != 0 {
		t.Errorf("saw %+v", f)
	}
	stop()
	again, _ := start(t, c)
	if f := again.Facts().Foreign; len(f) != 0 {
		t.Errorf("after a restart, saw %+v", f)
	}
}

// Whoever started the server starts it again, on the new interface.
func TestReplacedInterfaceEndsTheServer(t *testing.T) {
	segment(t)
	s, err := New(config(t))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(t.Context()) }()
	<-s.Ready()
	sh(t, "ip link set srv down; ip link set srv up")
	select {
	case err := <-ended:
		t.Fatalf("it ended as the interface was down for a moment: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	sh(t, "ip link del srv")
	select {
	case err := <-ended:
		if err == nil || s.Facts().Serving {
			t.Errorf("it ended with %v, and says that it serves: %v", err, s.Facts().Serving)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on without its interface")
	}
}
