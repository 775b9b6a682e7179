package hub

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ingot/internal/nat"
)

// accessesOf is a microVM's port and limit, whose host is silent; set and cut do what the
// test says.
func accessesOf(t *testing.T, file string) (a *accesses, at *netip.Addr) {
	t.Helper()
	at = new(netip.Addr)
	g := &guest{Host: "host-0", Namespace: "ns", Name: "web", UID: "1", Cards: []card{{MAC: "02:00:00:00:00:01"}, {MAC: "02:00:00:00:00:02"}}}
	egress, err := nat.ParseEgress([]string{"deny all"})
	if err != nil {
		t.Fatal(err)
	}
	a = &accesses{
		file: file, log: slog.New(slog.DiscardHandler), failed: true,
		guests:  newGuests([]Machine{{Name: "host-0", Host: true}}, "", nil, slog.New(slog.DiscardHandler)),
		address: func(*guest) (netip.Addr, bool) { return *at, true },
		set:     func(inForce) error { return nil },
		cut:     func([]nat.Published) error { return nil },
		all:     []access{{Guest: g, Ports: []nat.Port{{Protocol: "tcp", Port: 8080, To: 80}}, Egress: egress}},
	}
	return a, at
}

// TestLimitsNeedNoAddress: a microVM is held to what it may open by its cards, whether it
// has an address or has let go of it.
func TestLimitsNeedNoAddress(t *testing.T) {
	a, at := accessesOf(t, filepath.Join(t.TempDir(), "access.json"))
	for _, address := range []string{"", "192.168.10.30", ""} {
		*at = netip.Addr{}
		if address != "" {
			*at = netip.MustParseAddr(address)
		}
		if err := a.catchUp(); err != nil {
			t.Fatal(err)
		}
		if x := a.wanted(); len(x.restricted) != 2 || len(x.published) != min(len(address), 1) {
			t.Errorf("at %q: %+v", address, x)
		}
	}
}

// TestRulesWithoutRoom: a port follows its microVM's address also where that can't be kept,
// and is kept once it can.
func TestRulesWithoutRoom(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "full")
	if err := os.WriteFile(dir, nil, 0o600); err != nil { // nothing can be made in it
		t.Fatal(err)
	}
	a, at := accessesOf(t, filepath.Join(dir, "access.json"))
	var is inForce
	a.set = func(x inForce) error { is = x; return nil }
	*at = netip.MustParseAddr("192.168.10.31")
	if err := a.catchUp(); err == nil {
		t.Error("it is kept")
	}
	if len(is.published) != 1 || is.published[0].Guest != *at {
		t.Errorf("in force is %+v", is)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := a.catchUp(); err != nil {
		t.Error(err)
	}
	kept := accesses{file: a.file}
	if err := kept.load(); err != nil || len(kept.all) != 1 || kept.all[0].Address != *at {
		t.Errorf("kept: %+v, %v", kept.all, err)
	}
}

// TestCutsAreRepeated: what was let in by a port that is none any more is cut off, if not at
// once.
func TestCutsAreRepeated(t *testing.T) {
	a, at := accessesOf(t, filepath.Join(t.TempDir(), "access.json"))
	var cuts []netip.Addr
	fails := errors.New("the kernel is busy")
	a.cut = func(all []nat.Published) error {
		for _, p := range all {
			cuts = append(cuts, p.Guest)
		}
		return fails
	}
	first, second := netip.MustParseAddr("192.168.10.30"), netip.MustParseAddr("192.168.10.31")
	for _, address := range []netip.Addr{first, second, second} {
		*at = address
		a.catchUp()
	}
	fails = nil
	for range 2 {
		if err := a.catchUp(); err != nil {
			t.Error(err)
		}
	}
	if !slices.Equal(cuts, []netip.Addr{first, first, first}) {
		t.Errorf("cut: %v", cuts)
	}
}
