package hub

import (
	"net/netip"
	"testing"
)

// TestLatest: a microVM that has let go of its address is held to its rules there, until
// somebody else has it.
func TestLatest(t *testing.T) {
	first, second := netip.MustParseAddr("192.168.10.30"), netip.MustParseAddr("192.168.10.31")
	for name, c := range map[string]struct {
		now    netip.Addr
		known  bool
		others bool
		want   netip.Addr
	}{
		"it has it":               {first, true, false, first},
		"it has another":          {second, true, false, second},
		"leases are not read yet": {netip.Addr{}, false, true, first},
		"it has none":             {netip.Addr{}, true, false, first},
		"another one has it":      {netip.Addr{}, true, true, netip.Addr{}},
	} {
		a := accesses{
			address: func(*guest) (netip.Addr, bool) { return c.now, c.known },
			others:  func(*guest, netip.Addr) bool { return c.others },
		}
		if got := a.latest(access{Address: first}); got != c.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}
