package dhcp

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Our own server serves the interface meanwhile, and neither is disturbed.
func TestSeekFindsAllButOurs(t *testing.T) {
	segment(t)
	s, _ := start(t, config(t))
	seek := func(atMost time.Duration) []Foreign {
		ctx, cancel := context.WithTimeout(t.Context(), atMost)
		defer cancel()
		found, err := Seek(ctx, "srv", a("192.168.10.2"))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := seek(100 * time.Millisecond); len(found) != 0 {
		t.Errorf("found %+v, where there is none", found)
	}
	sh(t, "ip -n client addr add 192.168.10.9/25 dev cli")
	other := background(t, in+serverLine(t, "cli", "192.168.10.9", "192.168.10.0/25", "192.168.10.100", "192.168.10.110", filepath.Join(t.TempDir(), "leases")))
	eventually(t, "the other serves", func() bool { return strings.Contains(other.String(), "serving") })
	found := seek(500 * time.Millisecond)
	if len(found) != 1 || found[0].Server != a("192.168.10.9") || found[0].Offers != a("192.168.10.100") || found[0].MAC.String() != cardOf(t, "cli").String() {
		t.Errorf("found %+v", found)
	}
	own, err := net.InterfaceByName("srv")
	if err != nil {
		t.Fatal(err)
	}
	if l := only(s, own.HardwareAddr); l != nil {
		t.Errorf("it took %+v", l)
	}
	if _, err := Seek(t.Context(), "nosuch", a("192.168.10.2")); err == nil {
		t.Error("no error where there is no interface")
	}
}
