package hub_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"ingot/internal/hub"
)

// What the hub's rules, which are IPv4's, can't be made of.
func TestConfigWantsIPv4(t *testing.T) {
	const good = "address: 192.168.10.2\nsubnet: 192.168.10.0/25\nrange-first: 192.168.10.26\nrange-last: 192.168.10.126\n"
	for text, want := range map[string]string{
		"":                         "",
		"trusted: 100.64.0.0/30\n": "",
		"trusted: fd00::/64\n":     "trusted: fd00::/64 is no IPv4 prefix",
		"machines: [{name: host-0, address: \"fd00::3\"}]\n": "machines: fd00::3 of host-0 is no IPv4 address",
		"vpn: {subnet: 10.91.0.0/24, port: 51820}\n":         "",
		"vpn: {subnet: 10.91.0.0/24}\n":                      "vpn: port: it is missing",
		"vpn: {subnet: \"fd00::/64\", port: 51820}\n":        "vpn: subnet: fd00::/64 is no IPv4 prefix with room for peers",
		"vpn: {subnet: 192.168.0.0/16, port: 51820}\n":       "vpn: subnet: 192.168.0.0/16 overlaps with 192.168.10.0/25",
	} {
		path := filepath.Join(t.TempDir(), "hub.yaml")
		if err := os.WriteFile(path, []byte(good+text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := hub.ReadConfig(path, "test")
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// What `ingot up` writes is what a hub reads: where it tells its metrics, or that it
// does not.
func TestConfigIsWrittenWhole(t *testing.T) {
	for _, at := range []string{"192.168.10.2:9093", ""} {
		c := hub.Default()
		c.Address, c.Subnet = netip.MustParseAddr("192.168.10.2"), netip.MustParsePrefix("192.168.10.0/25")
		c.First, c.Last = netip.MustParseAddr("192.168.10.26"), netip.MustParseAddr("192.168.10.126")
		if at != "" {
			c.Metrics = netip.MustParseAddrPort(at)
		}
		text, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "hub.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := hub.ReadConfig(path, "test")
		if err != nil || got.Metrics != c.Metrics {
			t.Errorf("%q becomes %v, %v, by\n%s", at, got.Metrics, err, text)
		}
	}
}
