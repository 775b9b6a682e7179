package env

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/hub"
)

// everything is all that a file can say of DHCP.
const everything = `format: 2
subnet: 192.168.10.0/25
dhcp:
  ranges:
    - {first: 192.168.10.26, last: 192.168.10.99}
    - {first: 192.168.10.110, last: 192.168.10.110}
  exclude: [192.168.10.3, 192.168.10.40/30]
  lease: {default: 3600, min: 90s, max: 36h}
  routers: [192.168.10.1, 192.168.10.2]
  dns: [192.168.10.2, 9.9.9.9]
  domain: example.org
  ntp: [192.168.10.4]
  mtu: 1400
  routes:
    - {to: 10.8.0.0/14, via: 192.168.10.5}
    - {to: 10.12.0.0/16, via: 0.0.0.0}
  options:
    - {code: 66, value: tftp.example.org}
    - {code: 119, value: [a.example.org, b.example.org]}
    - {code: 224, type: hex, value: 07ff}
  reservations:
    - {address: 192.168.10.120, mac: 02-00-00-00-00-0A}
    - {address: 192.168.10.121, client_id: 01:02:03}
    - {address: 192.168.10.122, client_id: printer}
    - {address: 192.168.10.123, microvm: web}
    - {address: 10.7.0.5, mac: 02:00:00:00:00:0a}
  subnets:
    - subnet: 10.7.0.0/24
      first: 10.7.0.10
      last: 10.7.0.20
      lease: {default: 24h}
      routers: [10.7.0.1]
      options: [{code: 67, type: text, value: boot}]
    - subnet: 10.9.0.0/30
`

func TestEverythingOfDHCP(t *testing.T) {
	e := resolve(t, everything, nil)
	r := func(first, last string) hub.Range { return hub.Range{First: addr(first), Last: addr(last)} }
	want := DHCP{DHCP: hub.DHCP{
		Network: hub.Network{
			Ranges:  []hub.Range{r("192.168.10.26", "192.168.10.99"), r("192.168.10.110", "192.168.10.110")},
			Exclude: []netip.Prefix{netip.MustParsePrefix("192.168.10.3/32"), netip.MustParsePrefix("192.168.10.40/30")},
			Lease:   hub.LeaseTimes{Default: time.Hour, Min: 90 * time.Second, Max: 36 * time.Hour},
			Routers: []netip.Addr{addr("192.168.10.1"), addr("192.168.10.2")}, DNS: []netip.Addr{addr("192.168.10.2"), addr("9.9.9.9")},
			Domain: "example.org", NTP: []netip.Addr{addr("192.168.10.4")}, MTU: 1400,
			Routes:  []hub.Route{{To: netip.MustParsePrefix("10.8.0.0/14"), Via: addr("192.168.10.5")}, {To: netip.MustParsePrefix("10.12.0.0/16"), Via: addr("0.0.0.0")}},
			Options: []hub.Option{{Code: 66, Value: []string{"tftp.example.org"}}, {Code: 119, Value: []string{"a.example.org", "b.example.org"}}, {Code: 224, Type: "hex", Value: []string{"07ff"}}},
		},
		Subnets: []hub.Subnet{
			{Prefix: netip.MustParsePrefix("10.7.0.0/24"), Network: hub.Network{
				Ranges: []hub.Range{r("10.7.0.10", "10.7.0.20")}, Lease: hub.LeaseTimes{Default: 24 * time.Hour}, Routers: []netip.Addr{addr("10.7.0.1")},
				Options: []hub.Option{{Code: 67, Type: "text", Value: []string{"boot"}}}}},
			{Prefix: netip.MustParsePrefix("10.9.0.0/30")},
		},
	}, Reservations: []hub.Reservation{
		{Address: addr("192.168.10.120"), MAC: "02:00:00:00:00:0a"}, {Address: addr("192.168.10.121"), ClientID: "01:02:03"},
		{Address: addr("192.168.10.122"), ClientID: "70:72:69:6e:74:65:72"}, {Address: addr("192.168.10.123"), MicroVM: "default/web"},
		{Address: addr("10.7.0.5"), MAC: "02:00:00:00:00:0a"},
	}}
	if diff := cmp.Diff(want, e.DHCP, comparable); diff != "" {
		t.Error(diff)
	}
	if got, want := show(e), "192.168.10.0/25 100.64.0.0/30 guests 192.168.10.26 - 192.168.10.99, 192.168.10.110; "+
		"network-hub 192.168.10.2 [hub]; host-0 192.168.10.4 [host]; host-1 192.168.10.5 [host]"; got != want {
		t.Errorf("got %s", got) // .3 is excluded
	}
	roundTrip(t, e)
}

// TestDHCPChanges has a dry run say what is different, and nothing else.
func TestDHCPChanges(t *testing.T) {
	plain := resolve(t, "format: 2\nsubnet: 192.168.10.0/25\n", nil)
	all := resolve(t, everything, nil)
	all.Machines = plain.Machines
	other := resolve(t, strings.NewReplacer("mtu: 1400", "mtu: 1450", "3600", "30m", "via: 192.168.10.5", "via: 192.168.10.6", "  domain: example.org\n", "",
		"type: hex, value: 07ff", "type: uint16, value: [7, 8]", "[10.7.0.1]", "[10.7.0.2]", "    - subnet: 10.9.0.0/30\n", "",
		"last: 192.168.10.110", "last: 192.168.10.111", "client_id: printer", "client_id: scanner").Replace(everything), nil)
	other.Machines = plain.Machines
	const later = ": who has a lease hears of it when it renews it"
	for _, c := range []struct {
		name    string
		was, is Env
		want    []string
	}{
		{"nothing", all, all, nil},
		{"all of it", plain, all, []string{
			"~ DHCP range 192.168.10.26 - 192.168.10.99, 192.168.10.110, was 192.168.10.26 - 192.168.10.126: a microVM with an address outside gets another one when it renews it",
			"+ DHCP exclude: 192.168.10.3/32 192.168.10.40/30", "+ DHCP lease default: 1h", "+ DHCP lease min: 1m30s", "+ DHCP lease max: 36h",
			"+ DHCP routers: 192.168.10.1 192.168.10.2", "+ DHCP dns: 192.168.10.2 9.9.9.9", "+ DHCP domain: example.org", "+ DHCP ntp: 192.168.10.4", "+ DHCP mtu: 1400",
			"+ DHCP route to 10.8.0.0/14: via 192.168.10.5", "+ DHCP route to 10.12.0.0/16: via 0.0.0.0",
			`+ DHCP option 66: "tftp.example.org"`, `+ DHCP option 119: "a.example.org, b.example.org"`, `+ DHCP option 224: hex "07ff"`,
			"+ DHCP subnet 10.7.0.0/24: 10.7.0.10 - 10.7.0.20", "+ DHCP in 10.7.0.0/24 lease default: 24h", "+ DHCP in 10.7.0.0/24 routers: 10.7.0.1",
			`+ DHCP in 10.7.0.0/24 option 67: text "boot"`, "+ DHCP subnet 10.9.0.0/30: only for whom an address is kept",
			"~ address 192.168.10.120 is kept for 02:00:00:00:00:0a, which has it when it asks next",
			"~ address 192.168.10.121 is kept for client id 01:02:03, which has it when it asks next",
			"~ address 192.168.10.122 is kept for client id 70:72:69:6e:74:65:72, which has it when it asks next",
			"~ address 192.168.10.123 is kept for microVM default/web, which has it when it asks next",
			"~ address 10.7.0.5 is kept for 02:00:00:00:00:0a, which has it when it asks next",
		}},
		{"some of it", all, other, []string{
			"~ DHCP range 192.168.10.26 - 192.168.10.99, 192.168.10.110 - 192.168.10.111, was 192.168.10.26 - 192.168.10.99, 192.168.10.110: a microVM with an address outside gets another one when it renews it",
			"~ DHCP lease default: 30m, was 1h" + later, "~ DHCP mtu: 1450, was 1400" + later,
			"~ DHCP route to 10.8.0.0/14: via 192.168.10.6, was via 192.168.10.5" + later, `~ DHCP option 224: uint16 "7, 8", was hex "07ff"` + later,
			"~ DHCP in 10.7.0.0/24 routers: 10.7.0.2, was 10.7.0.1" + later,
			"- DHCP domain, which was example.org", "- DHCP subnet 10.9.0.0/30, which was only for whom an address is kept",
			"~ address 192.168.10.122 is kept for client id 73:63:61:6e:6e:65:72, which has it when it asks next",
			"~ address 192.168.10.122 is not kept for client id 70:72:69:6e:74:65:72 any more",
		}},
	} {
		if diff := cmp.Diff(c.want, changes(&c.was, c.is)); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
		roundTrip(t, c.is)
	}
}

// TestDHCPMistakes has all that can be wrong with DHCP in one file, and each with its line.
func TestDHCPMistakes(t *testing.T) {
	text, err := os.ReadFile("testdata/dhcp.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Parse("dhcp.yaml", text)
	want, _ := os.ReadFile("testdata/dhcp.txt")
	if diff := cmp.Diff(string(want), err.Error()+"\n"); diff != "" {
		t.Error(diff)
	}
	const net = "format: 2\nsubnet: 10.0.0.0/24\n"
	many := strings.Repeat("{first: 10.0.0.30, last: 10.0.0.30}, ", mostItems+1)
	for text, want := range map[string]string{
		"format: 2\ndhcp: {routers: [10.0.0.1]}":                                                         "2: dhcp.routers[0]: an address needs a subnet: say which",
		"format: 2\ndhcp: {exclude: [10.0.0.1]}":                                                         "2: dhcp.exclude[0]: an address needs a subnet: say which",
		"format: 2\ndhcp: {reservations: [{address: 10.0.0.9, microvm: x}]}":                             "2: dhcp.reservations[0].address: an address needs a subnet: say which",
		net + "dhcp: {first: 10.0.0.30, last: 10.0.0.40, ranges: [{first: 10.0.0.50, last: 10.0.0.60}]}": "3: dhcp.ranges: first and last are a range already: make them one of these",
		net + "dhcp: {ranges: []}":                                                                       "3: dhcp.ranges: it is empty: left out, it is as usual",
		net + "dhcp: {ranges: [" + many + "]}":                                                           "3: dhcp.ranges: there are 257, and 256 are the most",
		net + "dhcp: {ranges: 10.0.0.30-10.0.0.40}":                                                      `3: dhcp.ranges: it must be a list, and is "10.0.0.30-10.0.0.40"`,
		net + "dhcp: {options: [{code: 66, value: " + strings.Repeat("x", 200) + "}]}":                   "3: dhcp: its options have 202 bytes, and every client has room for 190",
		net + "dhcp: {reservations: [{address: 10.0.0.2, mac: '02:00:00:00:00:01'}]}":                    "3: dhcp.reservations[0].address: 10.0.0.2 is network-hub's",
		"format: 2\ndhcp: {subnets: [{subnet: 192.168.0.0/16}]}\nsubnet: 192.168.10.0/25\n":              "2: dhcp.subnets[0].subnet: 192.168.0.0/16 overlaps with subnet 192.168.10.0/25",
	} {
		d, err := Parse("f", []byte(text))
		if err == nil {
			_, err = d.resolve("lab", nil, nobodyElse)
		}
		if err == nil || err.Error() != "f:"+want {
			t.Errorf("%s:\ngot  %v\nwant f:%s", text, err, want)
		}
	}
}

// A subnet that is decided keeps away from those behind relays.
func TestSubnetsBehindRelaysAreAvoided(t *testing.T) {
	d := parse(t, "format: 2\ndhcp: {subnets: [{subnet: 192.168.0.0/16}]}\n")
	taken := errors.New("taken")
	_, err := d.resolve("lab", nil, func(want netip.Prefix, avoid ...netip.Prefix) (netip.Prefix, error) {
		for _, p := range avoid {
			if p.IsValid() && p.Overlaps(want) {
				return want, taken
			}
		}
		return want, nil
	})
	if !errors.Is(err, taken) {
		t.Errorf("%v", err)
	}
	was := resolve(t, "format: 2\n", nil)
	if _, err := d.resolve("lab", &was, nobodyElse); err == nil || err.Error() != "f:2: dhcp.subnets[0].subnet: 192.168.0.0/16 overlaps with 192.168.10.0/25, which the environment has" {
		t.Errorf("%v", err)
	}
}
