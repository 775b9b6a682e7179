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

// What the hub's rules, which are IPv4's, or its names can't be made of.
func TestConfigIsChecked(t *testing.T) {
	const good = "address: 192.168.10.2\nsubnet: 192.168.10.0/25\nrange-first: 192.168.10.26\nrange-last: 192.168.10.126\n"
	const domain = "domain: lab.internal\n"
	for text, want := range map[string]string{
		domain:                              "",
		domain + "trusted: 100.64.0.0/30\n": "",
		domain + "trusted: fd00::/64\n":     "trusted: fd00::/64 is no IPv4 prefix",
		domain + "machines: [{name: host-0, address: \"fd00::3\"}]\n": "machines: fd00::3 of host-0 is no IPv4 address",
		domain + "vpn: {subnet: 10.91.0.0/24, port: 51820}\n":         "",
		domain + "vpn: {subnet: 10.91.0.0/24}\n":                      "vpn: port: it is missing",
		domain + "vpn: {subnet: \"fd00::/64\", port: 51820}\n":        "vpn: subnet: fd00::/64 is no IPv4 prefix with room for peers",
		domain + "vpn: {subnet: 192.168.0.0/16, port: 51820}\n":       "vpn: subnet: 192.168.0.0/16 overlaps with 192.168.10.0/25",
		"":                        "domain: it is missing",
		"domain: \"\"\n":          "domain: it is missing",
		"domain: lab..internal\n": "domain: \"lab..internal\" is not a name",
		"domain: lab.internal.\n": "domain: \"lab.internal.\" is not a name",
		"domain: " + strings.Repeat("x", 64) + "\n":   "is not a name",
		"domain: " + strings.Repeat("x.", 63) + "x\n": "is not a name",
		"domain: Lab\n": "",
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
		c.Domain = "lab.internal"
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
