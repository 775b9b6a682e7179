package hub_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
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
		domain + "machines: [{name: host-0, address: \"fd00::3\"}]\n":                                              "machines: fd00::3 of host-0 is no IPv4 address",
		domain + "vpn: {subnet: 10.91.0.0/24, port: 51820}\n":                                                      "",
		domain + "interface: ../eth0\n":                                                                            "interface: \"../eth0\" is no interface's name",
		domain + "uplink: a-name-that-is-too-long\n":                                                               "uplink: \"a-name-that-is-too-long\" is no interface's name",
		domain + "dns-upstreams: [192.168.10.2]\n":                                                                 "dns-upstreams: 192.168.10.2 is the hub itself",
		domain + "vpn: {subnet: 10.91.0.0/24, port: 53}\n":                                                         "vpn: port: the hub serves something else at 53",
		domain + "vpn: {subnet: 10.91.0.0/24}\n":                                                                   "vpn: port: it is missing",
		domain + "vpn: {subnet: \"fd00::/64\", port: 51820}\n":                                                     "vpn: subnet: fd00::/64 is no IPv4 prefix with room for peers",
		domain + "vpn: {subnet: 192.168.0.0/16, port: 51820}\n":                                                    "vpn: subnet: 192.168.0.0/16 overlaps with 192.168.10.0/25",
		domain + "dns-upstreams: [192.0.2.1, '192.0.2.1:5353', '2001:db8::1', '[2001:db8::1]:5353', 127.0.0.53]\n": "",
		domain + "dns-upstreams: [192.0.2.1, dns.example.org]\n":                                                   "dns-upstreams: \"dns.example.org\" is not a resolver's address, nor ADDRESS:PORT",
		domain + "dns-upstreams: ['dns.example.org:53']\n":                                                         "dns-upstreams: \"dns.example.org:53\" is not",
		domain + "dns-upstreams: ['192.0.2.1:0']\n":                                                                "dns-upstreams: \"192.0.2.1:0\" is not",
		domain + "dns-upstreams: [0.0.0.0]\n":                                                                      "dns-upstreams: \"0.0.0.0\" is not",
		domain + "dns-upstreams: ['']\n":                                                                           "dns-upstreams: \"\" is not",
		domain + "tailscale: {}\n":                                                                                 "tailscale: hostname: it is missing",
		domain + "tailscale: {hostname: x}\ntrusted: 10.9.0.0/16\n":                                                "",
		domain + "tailscale: {hostname: x}\ntrusted: 100.64.0.0/30\n":                                              "trusted: 100.64.0.0/30 overlaps with 100.64.0.0/10, which tailnets give their peers",
		domain + "tailscale: {hostname: x}\ntrusted: 0.0.0.0/0\n":                                                  "trusted: 0.0.0.0/0 overlaps with 100.64.0.0/10",
		domain + "tailscale: {hostname: x}\nvpn: {subnet: 100.100.0.0/24, port: 51820}\n":                          "vpn: subnet: 100.100.0.0/24 overlaps with 100.64.0.0/10",
		domain + "tailscale: {hostname: x}\ndhcp: {subnets: [{subnet: 10.7.0.0/24}, {subnet: 100.127.0.0/24}]}\n":  "dhcp: subnets: 100.127.0.0/24 overlaps with 100.64.0.0/10",
		domain + "vpn: {subnet: 100.100.0.0/24, port: 51820}\n":                                                    "",
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

func TestSubnetIsAPrefix(t *testing.T) {
	_, err := hub.ParseConfig([]byte("address: 192.168.10.2\nsubnet: 192.168.10.2/25\nrange-first: 192.168.10.26\nrange-last: 192.168.10.126\ndomain: lab.internal\n"))
	if err == nil || !strings.Contains(err.Error(), "subnet: 192.168.10.2/25 has bits after its prefix: is it 192.168.10.0/25?") {
		t.Error(err)
	}
}

// A resolver is at port 53, unless another one is said.
func TestResolvers(t *testing.T) {
	c, err := hub.ParseConfig([]byte("address: 192.168.10.2\nsubnet: 192.168.10.0/25\nrange-first: 192.168.10.26\nrange-last: 192.168.10.126\ndomain: lab.internal\n" +
		"dns-upstreams: [192.0.2.1, '192.0.2.2:5353', '2001:db8::1', '[2001:db8::2]:5353']\n"))
	want := []string{"192.0.2.1:53", "192.0.2.2:5353", "[2001:db8::1]:53", "[2001:db8::2]:5353"}
	if err != nil || !slices.Equal(c.Upstreams, want) {
		t.Errorf("%q, %v; want %q", c.Upstreams, err, want)
	}
}

// All that DHCP can be told is read as it was written, and what can't be served is not read.
func TestDHCPIsWrittenWhole(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	c := hub.Default()
	c.Address, c.Subnet, c.Domain = addr("192.168.10.2"), prefix("192.168.10.0/25"), "lab.internal"
	c.First, c.Last = addr("192.168.10.26"), addr("192.168.10.60")
	c.DHCP = hub.DHCP{Network: hub.Network{
		Ranges: []hub.Range{{First: addr("192.168.10.80"), Last: addr("192.168.10.90")}}, Exclude: []netip.Prefix{prefix("192.168.10.88/30")},
		Lease: hub.LeaseTimes{Default: time.Hour, Min: 90 * time.Second, Max: 36 * time.Hour}, Routers: []netip.Addr{addr("192.168.10.1")},
		DNS: []netip.Addr{addr("9.9.9.9"), addr("192.168.10.2")}, Domain: "example.org", NTP: []netip.Addr{addr("192.168.10.4")}, MTU: 1400,
		Routes:  []hub.Route{{To: prefix("10.8.0.0/14"), Via: addr("192.168.10.5")}},
		Options: []hub.Option{{Code: 66, Value: []string{"tftp: # \"x\"\n\t'"}}, {Code: 67, Value: []string{"~"}}, {Code: 252, Type: "text", Value: []string{"true"}}, {Code: 224, Type: "hex", Value: []string{"07"}}},
	}, Subnets: []hub.Subnet{{Prefix: prefix("10.7.0.0/24"), Network: hub.Network{Ranges: []hub.Range{{First: addr("10.7.0.9"), Last: addr("10.7.0.9")}}, MTU: 576}}}}
	c.Reservations = []hub.Reservation{
		{MicroVM: "default/web", Address: addr("192.168.10.10")}, {MAC: "02:00:00:00:00:01", Address: addr("192.168.10.11")}, {ClientID: "01:0a", Address: addr("10.7.0.9")},
	}
	got, err := written(t, c)
	if err != nil || !reflect.DeepEqual(got.DHCP, c.DHCP) || !reflect.DeepEqual(got.Reservations, c.Reservations) {
		t.Errorf("got  %+v, %+v, %v\nwant %+v, %+v", got.DHCP, got.Reservations, err, c.DHCP, c.Reservations)
	}
	for want, change := range map[string]func(c *hub.Config){
		"two ranges hold 192.168.10.60": func(c *hub.Config) {
			c.DHCP.Ranges = []hub.Range{{First: addr("192.168.10.60"), Last: addr("192.168.10.61")}}
		},
		"lease times: ":                 func(c *hub.Config) { c.DHCP.Lease.Max = time.Minute },
		"option 53: ":                   func(c *hub.Config) { c.DHCP.Options[0].Code = 53 },
		"overlap":                       func(c *hub.Config) { c.DHCP.Subnets[0] = hub.Subnet{Prefix: prefix("192.168.0.0/16")} },
		`mac: "02:00" is no card's`:     func(c *hub.Config) { c.Reservations[1].MAC = "02:00" },
		`client-id: "x" is not bytes`:   func(c *hub.Config) { c.Reservations[2].ClientID = "x" },
		"reservation of 192.168.10.2: ": func(c *hub.Config) { c.Reservations[0].Address = c.Address },
	} {
		wrong := c
		wrong.DHCP.Options, wrong.DHCP.Subnets, wrong.Reservations = slices.Clone(c.DHCP.Options), slices.Clone(c.DHCP.Subnets), slices.Clone(c.Reservations)
		change(&wrong)
		if _, err := written(t, wrong); err == nil || !strings.Contains(err.Error(), want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v, want %q", err, want)
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
		got, err := written(t, c)
		if err != nil || got.Metrics != c.Metrics {
			t.Errorf("%q becomes %v, %v", at, got.Metrics, err)
		}
	}
}

// written is what a hub reads of a configuration that was written for it.
func written(t *testing.T, c hub.Config) (hub.Config, error) {
	t.Helper()
	text, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return hub.ReadConfig(path, "test")
}
