package env

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestVPN is what becomes of what files say of a VPN, one after the other.
func TestVPN(t *testing.T) {
	var was *Env
	for _, c := range []struct {
		text, vpn string
		changes   []string
	}{
		{"format: 2", "", []string{"+ environment"}},
		{"format: 2\nvpn: {}", "peers in 10.91.0.0/24, UDP port 51820", []string{"+ VPN: peers in 10.91.0.0/24, UDP port 51820"}},
		{"format: 2\nvpn: {}", "peers in 10.91.0.0/24, UDP port 51820", nil},
		{"format: 2\nvpn: {port: 7, endpoint: hub.example.org}", "peers in 10.91.0.0/24, UDP port 7, reached at hub.example.org",
			[]string{"~ VPN: peers in 10.91.0.0/24, UDP port 7, reached at hub.example.org, was peers in 10.91.0.0/24, UDP port 51820: peers need other configurations"}},
		{"format: 2\nvpn: {endpoint: hub.example.org}", "peers in 10.91.0.0/24, UDP port 7, reached at hub.example.org", nil},
		{"format: 2\nvpn:\n  # subnet: all as usual", "", []string{"- VPN: its peers can't come in any more; it is kept who they are"}},
		{"format: 2\nvpn: {subnet: 10.5.0.0/29}", "peers in 10.5.0.0/29, UDP port 51820", []string{"+ VPN: peers in 10.5.0.0/29, UDP port 51820"}},
	} {
		e := resolve(t, c.text, was)
		got := ""
		if e.VPN.On() {
			got = e.VPN.String()
		}
		if got != c.vpn {
			t.Errorf("%s: %s, want %s", c.text, got, c.vpn)
		}
		lines := changes(was, e)
		if was == nil {
			lines = []string{lines[0][:len("+ environment")]}
		}
		if diff := cmp.Diff(c.changes, lines); diff != "" {
			t.Errorf("%s: %s", c.text, diff)
		}
		roundTrip(t, e)
		was = &e
	}
	// A subnet that is chosen avoids the VPN's; one that is there can't.
	d := parse(t, "format: 2\nvpn: {subnet: 192.168.10.0/24}")
	if _, err := d.resolve("lab", was, nobodyElse); err == nil || !strings.Contains(err.Error(), "f:2: vpn.subnet: 192.168.10.0/24 overlaps with subnet 192.168.10.0/25 or uplink") {
		t.Errorf("a VPN on the subnet that is there: %v", err)
	}
	if _, err := d.resolve("lab", nil, nobodyElse); err == nil || err.Error() != "overlaps" {
		t.Errorf("a VPN on the usual subnet: %v", err)
	}
}

func TestVPNCollisions(t *testing.T) {
	other := Env{Name: "other", Subnet: netip.MustParsePrefix("10.8.0.0/24"), Uplink: netip.MustParsePrefix("10.9.0.0/30"),
		VPN: VPN{Subnet: netip.MustParsePrefix("10.7.0.0/24"), Port: 40123}}
	collide := func(v VPN) string {
		u := up{name: "lab", others: []Env{other}, env: Env{Name: "lab", VPN: v}}
		u.lab = u.env.Lab("")
		return u.collisions().Error()
	}
	if got := collide(VPN{Subnet: netip.MustParsePrefix("10.7.0.0/16"), Port: 40123}); !strings.Contains(got, "vpn.port: environment other has UDP port 40123 already") ||
		!strings.Contains(got, "vpn.subnet: 10.7.0.0/16 overlaps with environment other, which has 10.7.0.0/24") {
		t.Error(got)
	}
	c, err := net.ListenUDP("udp", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	taken := uint16(c.LocalAddr().(*net.UDPAddr).Port)
	if got := collide(VPN{Subnet: netip.MustParsePrefix("10.6.0.0/24"), Port: taken}); !strings.Contains(got, "something on this machine listens at UDP port") {
		t.Error(got)
	}
	// A port that nobody has asked for is another one.
	u := up{others: []Env{other}, env: Env{VPN: VPN{Subnet: netip.MustParsePrefix("10.6.0.0/24"), Port: other.VPN.Port}}}
	if u.choosePort(); u.env.VPN.Port <= other.VPN.Port {
		t.Errorf("chosen: %d", u.env.VPN.Port)
	}
}

func TestEndpoint(t *testing.T) {
	for text, want := range map[string]string{
		"hub.example.org": "hub.example.org:51820", "hub.example.org:443": "hub.example.org:443", "203.0.113.7": "203.0.113.7:51820",
		"[2001:db8::1]:443": "[2001:db8::1]:443", "2001:db8::1": "[2001:db8::1]:51820", "hub": "hub:51820", "9to5.example.": "9to5.example.:51820",
		"": "", "a b": "", "a:b": "", "a:0": "", "a:70000": "", "-a.b": "", "a..b": "", "0.0.0.0": "", "300.1.1.1": "", "fe80::1%eth0": "", "[::1": "", "a\nPostUp = x": "",
		strings.Repeat("a.", 200) + "b": "",
	} {
		got := ""
		if validEndpoint(text) {
			got = VPN{Port: 51820, Endpoint: text}.endpoint(t.Context())
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
