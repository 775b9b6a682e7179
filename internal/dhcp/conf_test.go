package dhcp

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// asConfig is a server's configuration that does as dhcpd did.
func (d Dhcpd) asConfig() Config {
	return Config{
		Authoritative: d.Authoritative, DefaultLease: d.DefaultLease, MaxLease: d.MaxLease, MinLease: d.MinLease,
		Subnets: d.Subnets, Reservations: d.Reservations,
	}
}

// What we export for dhcpd we understand again.
func TestConfRoundTrip(t *testing.T) {
	want := exportConfig(full(t))
	d, err := ParseDhcpd(want)
	if err != nil || len(d.Left) > 0 {
		t.Fatalf("%v, left: %v", err, d.Left)
	}
	if got := exportConfig(d.asConfig()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// old is a hub's configuration as people write them.
const old = `# a hub of old
option domain-name "example.org";
option domain-name-servers 147.75.207.207, ns2.example.org;
option space PXE;
option wpad code 252 = text;
option wpad "http://wpad/";
default-lease-time 86400;
ddns-update-style none;
authoritative;
log-facility local7;
include "/etc/dhcp/more.conf";

class "phones" { match if substring (option vendor-class-identifier, 0, 5) = "Phone"; }

shared-network office {
  subnet 192.168.10.0 netmask 255.255.255.128 {
    option routers 192.168.10.2;
    option domain-name-servers 147.75.207.207, 147.75.207.208;
    option domain-search "example.org", "lab.example.org";
    max-lease-time 172800;
    pool { range 192.168.10.26 192.168.10.99; deny members of "phones"; }
    pool { range 192.168.10.100 192.168.10.126; }
    range 192.168.10.20;
    next-server 192.168.10.9;
    range 192.168.11.1 192.168.11.2;
  }
}
subnet 203.0.113.0 netmask 255.255.255.0 { }
subnet 10.0.0.0 netmask 255.0.255.0 { }

group {
  option host-name "x";
  host printer { hardware ethernet 02:00:00:AA:bb:01; fixed-address 192.168.10.10, printer.example.org; }
  host camera { option dhcp-client-identifier "cam"; fixed-address 192.168.10.11; filename "boot"; }
  host nobody { hardware ethernet 02:00:00:00:00:03; }
}
`

func TestConfSaysWhatIsLeft(t *testing.T) {
	d, err := ParseDhcpd(old)
	if err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	want := Dhcpd{
		Authoritative: true, DefaultLease: day, MaxLease: day, MinLease: time.Minute,
		Subnets: []Subnet{{
			Prefix: mustPrefix("192.168.10.0/25"),
			Ranges: []Range{{a("192.168.10.26"), a("192.168.10.99")}, {a("192.168.10.100"), a("192.168.10.126")}, {a("192.168.10.20"), a("192.168.10.20")}},
			Options: Options{
				Routers: []netip.Addr{a("192.168.10.2")}, DNS: []netip.Addr{a("147.75.207.207"), a("147.75.207.208")}, Domain: "example.org",
				More: map[uint8][]byte{252: []byte("http://wpad/"), 119: []byte("\x07example\x03org\x00\x03lab\x07example\x03org\x00")},
			},
			DefaultLease: day, MaxLease: 2 * day, MinLease: time.Minute,
		}, {
			Prefix:  mustPrefix("203.0.113.0/24"),
			Options: Options{Domain: "example.org", More: map[uint8][]byte{252: []byte("http://wpad/")}},
		}},
		Reservations: []Reservation{{IP: a("192.168.10.10"), MAC: []byte{2, 0, 0, 0xaa, 0xbb, 1}}, {IP: a("192.168.10.11"), ClientID: []byte("cam")}},
	}
	left := d.Left
	d.Left, d.said, d.timed = nil, nil, nil
	for i := range d.Subnets {
		d.Subnets[i].line = 0
	}
	if !reflect.DeepEqual(d, want) {
		t.Errorf("got  %+v\nwant %+v", d, want)
	}
	var got []string
	for _, l := range left {
		got = append(got, l.String())
	}
	if want := []string{
		"line 3: option domain-name-servers 147.75.207.207, ns2.example.org: it is not written as this option has to be: names are not looked up, and expressions not evaluated",
		"line 4: option space PXE: no option of this name is known",
		"line 10: log-facility local7: there is no such setting here",
		`line 11: include "/etc/dhcp/more.conf": no other file is read: put its text here`,
		`line 13: class "phones": there is no such setting here`,
		`line 21: deny members of "phones": a pool has nothing of its own but ranges`,
		"line 24: next-server 192.168.10.9: there is no such setting here",
		"line 25: range 192.168.11.1 192.168.11.2: it is no range in 192.168.10.0/25",
		"line 29: subnet 10.0.0.0 netmask 255.0.255.0: it is no IPv4 subnet",
		`line 32: option host-name "x": it holds for no subnet`,
		"line 33: fixed-address 192.168.10.10, printer.example.org: printer.example.org is not an address: names are not looked up",
		`line 34: filename "boot": hosts have no settings of their own but their address`,
		"line 35: host nobody: no address is fixed for it",
	}; !reflect.DeepEqual(got, want) {
		t.Errorf("left:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// What a hub says itself goes before what dhcpd said, and that is told.
func TestConfBesideOurs(t *testing.T) {
	d, err := ParseDhcpd(`default-lease-time 3600;
option domain-name "old.example.org";
option ntp-servers 192.168.10.4;
subnet 192.168.10.0 netmask 255.255.255.128 { range 192.168.10.20 192.168.10.30; range 192.168.10.120; option routers 192.168.10.1;
  option domain-name-servers 147.75.207.207, 147.75.207.208; }
subnet 10.7.0.0 netmask 255.255.255.0 { range 10.7.0.10 10.7.0.20; option routers 10.7.0.1; }
subnet 192.168.0.0 netmask 255.255.0.0 { range 192.168.1.1; }
`)
	if err != nil {
		t.Fatal(err)
	}
	// The last one overlaps with the first in the file itself.
	ours := config(t)
	ours.Subnets[0].Exclude = []netip.Prefix{mustPrefix("192.168.10.25/32")}
	ours.Subnets[0].Options.Domain = "lab.internal"
	c, left := ours.With(d)
	if _, err := New(c); err != nil {
		t.Fatal(err)
	}
	got := exportConfig(c)
	if want := `default-lease-time 3600;
max-lease-time 86400;
authoritative;

subnet 192.168.10.0 netmask 255.255.255.128 {
  range 192.168.10.20 192.168.10.24;
  range 192.168.10.26 192.168.10.126;
  option routers 192.168.10.2;
  option domain-name-servers 147.75.207.207, 147.75.207.208;
  option domain-name "lab.internal";
  option ntp-servers 192.168.10.4;
}

subnet 10.7.0.0 netmask 255.255.255.0 {
  range 10.7.0.10 10.7.0.20;
  option routers 10.7.0.1;
  option domain-name "old.example.org";
  option ntp-servers 192.168.10.4;
}
`; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if want := []Left{
		{2, `option domain-name "old.example.org"`, "in 192.168.10.0/25 this is the hub's to say"},
		{4, "option routers 192.168.10.1", "in 192.168.10.0/25 this is the hub's to say"},
		{7, "subnet 192.168.0.0 netmask 255.255.0.0", "it overlaps with 192.168.10.0/25"},
	}; !reflect.DeepEqual(left, want) {
		t.Errorf("left %v", left)
	}
}

// All that a hub says itself goes before, and lease times as a whole: half of ours and
// half of dhcpd's may be none.
func TestConfBesideAllOfOurs(t *testing.T) {
	d, err := ParseDhcpd(`max-lease-time 3600;
option ntp-servers 192.168.10.4;
option interface-mtu 1400;
option tftp-server-name "old";
option bootfile-name "boot";
subnet 192.168.10.0 netmask 255.255.255.128 { default-lease-time 300; }
subnet 10.7.0.0 netmask 255.255.255.0 { range 10.7.0.10; }
`)
	if err != nil {
		t.Fatal(err)
	}
	ours := config(t)
	ours.DefaultLease, ours.MaxLease = 2*time.Hour, 4*time.Hour
	ours.Subnets[0].Options.NTP = []netip.Addr{a("192.168.10.9")}
	ours.Subnets[0].Options.MTU = 1400
	ours.Subnets[0].Options.More = map[uint8][]byte{66: []byte("new"), 224: {7}}
	c, left := ours.With(d)
	if _, err := New(c); err != nil {
		t.Fatal(err)
	}
	o := c.Subnets[0].Options
	if want := (Options{
		Routers: ours.Subnets[0].Options.Routers, DNS: ours.Subnets[0].Options.DNS, NTP: []netip.Addr{a("192.168.10.9")}, MTU: 1400,
		More: map[uint8][]byte{66: []byte("new"), 67: []byte("boot"), 224: {7}},
	}); !reflect.DeepEqual(o, want) {
		t.Errorf("options %+v", o)
	}
	if n := c.Subnets[0]; c.DefaultLease != 2*time.Hour || c.MaxLease != 4*time.Hour || n.DefaultLease != 0 || n.MaxLease != 0 {
		t.Errorf("lease times %v, %v; %v, %v", c.DefaultLease, c.MaxLease, n.DefaultLease, n.MaxLease)
	}
	if n := c.Subnets[1]; n.DefaultLease != time.Hour || n.MaxLease != time.Hour {
		t.Errorf("lease times of dhcpd's own subnet: %v, %v", n.DefaultLease, n.MaxLease)
	}
	const why = "in 192.168.10.0/25 this is the hub's to say"
	if want := []Left{
		{1, "max-lease-time 3600", why}, {2, "option ntp-servers 192.168.10.4", why},
		{4, `option tftp-server-name "old"`, why}, {6, "default-lease-time 300", why},
	}; !reflect.DeepEqual(left, want) {
		t.Errorf("left %v", left)
	}
}

func TestConfThatIsNone(t *testing.T) {
	for text, want := range map[string]string{
		"default-lease-time 600":                      "line 1: default-lease-time 600 does not end",
		"\nsubnet 10.0.0.0 netmask 255.0.0.0 {\n":     "line 3: a block does not end",
		"authoritative;\n}\n":                         "line 2: a brace too many, or a semicolon missing",
		"group { default-lease-time 600 }\n":          "line 1: a brace too many, or a semicolon missing",
		strings.Repeat("group {\n", 60):               "line 51: more than 50 blocks in one another",
		"option domain-name \"example.org;\n\n\nend;": "line 1: option domain-name",
	} {
		if _, err := ParseDhcpd(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// Whatever a file says, what is understood of it is a configuration that can be
// served, and that says the same when it is exported and read again.
func FuzzConf(f *testing.F) {
	for _, text := range []string{page, old, exportConfig(full(f)), iscConf, "option x code 7 = array of unsigned integer 16; option x 1, 2;",
		"host a { hardware ethernet 1:2:3:4:5:6; fixed-address 10.0.0.1; }", "shared-network a { pool { range 10.0.0.1; } }", "range \"\";", "{};{}"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDhcpd(text)
		if err != nil {
			return
		}
		c := d.asConfig()
		for _, n := range c.Subnets {
			if _, err := newPool(c, n); err != nil {
				t.Fatalf("%+v: %v", n, err)
			}
		}
		exported := exportConfig(c)
		again, err := ParseDhcpd(exported)
		if err != nil || len(again.Left) > 0 {
			t.Fatalf("read again: %v, left: %v, of\n%s", err, again.Left, exported)
		}
		if got := exportConfig(again.asConfig()); got != exported {
			t.Errorf("exported\n%s\nand then\n%s", exported, got)
		}
	})
}
