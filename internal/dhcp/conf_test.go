package dhcp

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/need"
)

const page = `default-lease-time 600;
max-lease-time 7200;
authoritative;

subnet 192.168.10.0 netmask 255.255.255.128 {
  range 192.168.10.26 192.168.10.126;
  option routers 192.168.10.2;
  option domain-name-servers 147.75.207.207, 147.75.207.208;
}
`

func TestExportsAreThePages(t *testing.T) {
	c := config(t)
	c.Interface = "bond0.1000"
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.export(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, c.ConfigFile); got != page {
		t.Errorf("got\n%s", got)
	}
	if got := read(t, c.DefaultsFile); got != "INTERFACESv4=\"bond0.1000\"\n" {
		t.Errorf("got %s", got)
	}
}

func TestReadsThePage(t *testing.T) {
	got, err := ParseConf(page)
	if err != nil {
		t.Fatal(err)
	}
	want := Conf{
		Authoritative: true, DefaultLease: 10 * time.Minute, MaxLease: 2 * time.Hour,
		Subnets: config(t).Subnets,
	}
	if diff := cmp.Diff(want, got, equal...); diff != "" {
		t.Error(diff)
	}
}

var equal = []cmp.Option{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b Reservation) bool { return a.equal(b) }),
}

// full is a configuration with all that an export can say.
func full(t testing.TB) Config {
	c := config(t)
	c.DefaultLease, c.MaxLease, c.MinLease = 10*time.Minute, 2*time.Hour, 30*time.Second
	c.Subnets[0].Options.Domain = "lab; internal"
	c.Subnets[0].Options.NTP = []netip.Addr{a("192.168.10.4")}
	c.Subnets[0].Options.MTU = 1450
	c.Subnets[0].Options.Routes = []Route{{netip.MustParsePrefix("10.8.0.0/14"), a("192.168.10.5")}, {netip.MustParsePrefix("0.0.0.0/0"), a("192.168.10.2")}}
	c.Subnets[0].Options.More = map[uint8][]byte{66: []byte("tftp"), 224: {7}}
	c.Subnets = append(c.Subnets, Subnet{
		Prefix: mustPrefix("10.7.0.0/24"), Ranges: []Range{{a("10.7.0.10"), a("10.7.0.19")}, {a("10.7.0.30"), a("10.7.0.30")}},
		DefaultLease: time.Hour, MaxLease: 3 * time.Hour, MinLease: time.Minute,
	})
	c.Reservations = []Reservation{
		{IP: a("192.168.10.10"), MAC: mac(1)}, {IP: a("192.168.10.11"), ClientID: []byte("\x01two")}, {IP: a("10.7.0.12"), Name: "db"},
	}
	return c
}

func TestExportIsReadBack(t *testing.T) {
	c := full(t)
	text := exportConfig(c)
	got, err := ParseConf(text)
	if err != nil || len(got.Ignored) > 0 {
		t.Fatalf("%v, ignored %q\n%s", err, got.Ignored, text)
	}
	if diff := cmp.Diff(Conf{
		Authoritative: true, DefaultLease: c.DefaultLease, MaxLease: c.MaxLease, MinLease: c.MinLease, Subnets: c.Subnets, Reservations: c.Reservations,
	}, got, equal...); diff != "" {
		t.Errorf("%s\n%s", diff, text)
	}
	excluded := full(t)
	excluded.Subnets[0].Exclude = []netip.Prefix{mustPrefix("192.168.10.32/31"), mustPrefix("192.168.10.25/32"), mustPrefix("192.168.10.126/32")}
	if text := exportConfig(excluded); !strings.Contains(text, "  range 192.168.10.26 192.168.10.31;\n  range 192.168.10.34 192.168.10.125;\n") {
		t.Errorf("got\n%s", text)
	}
}

// dhcpd takes what we say that we do.
func TestDhcpdTakesOurExport(t *testing.T) {
	need.Binary(t, "dhcpd")
	c := full(t)
	path := filepath.Join(t.TempDir(), "dhcpd.conf")
	if err := os.WriteFile(path, []byte(exportConfig(c)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("dhcpd", "-t", "-4", "-cf", path).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s\n%s", err, out, exportConfig(c))
	}
}

func TestReadsOtherPeoplesConf(t *testing.T) {
	got, err := ParseConf(`# dhcpd.conf
option domain-name "example.org";
option domain-name-servers ns1.example.org, 10.5.5.2;
option rfc3442-classless-static-routes code 121 = array of integer 8;
option ms-classless code 249 = array of integer 8;
option space PXE;
ddns-update-style none;
default-lease-time 600; max-lease-time 7200;
log-facility local7;
next-server 10.5.5.3;
shared-network "224-29" {
  option ntp-servers 10.5.5.9;
  subnet 10.17.224.0 netmask 255.255.255.0 {
    option routers 10.17.224.1;
    max-lease-time 900;
    option rfc3442-classless-static-routes 24, 10,1,2, 10,17,224,9;
  }
  subnet 10.0.29.0 netmask 255.255.255.0 {
    pool {
      allow members of "foo";
      range 10.0.29.10 10.0.29.230;
      range dynamic-bootp 10.0.29.240;
    }
    option subnet-mask 255.255.255.0;
    option broadcast-address 10.0.29.255;
    option interface-mtu 9000;
    option domain-search "a.example.org", "example.org";
    option tftp-server-name 0a:b:FF;
    host inner { hardware ethernet 08:00:07:26:c0:a5; fixed-address 10.0.29.5, fantasia.example.org; option host-name "x"; }
  }
}
class "foo" { match if substring (option vendor-class-identifier, 0, 4) = "SUNW"; }
group {
  use-host-decl-names on;
  host passacaglia { option dhcp-client-identifier 01:02:03; fixed-address 10.17.224.7; }
  host nobody { fixed-address 10.17.224.8; }
}
subnet 10.9.0.0 netmask 255.0.255.0 { }
if option x = "}" { deny booting; } else { allow booting; }
`)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Subnets) != 2 || got.Authoritative || got.DefaultLease != 10*time.Minute {
		t.Fatalf("got %+v", got)
	}
	first, second := got.Subnets[0], got.Subnets[1]
	if first.Options.Domain != "example.org" || first.Options.NTP[0] != a("10.5.5.9") || first.MaxLease != 15*time.Minute || first.DefaultLease != 0 ||
		!reflect.DeepEqual(first.Options.Routes, []Route{{mustPrefix("10.1.2.0/24"), a("10.17.224.9")}}) {
		t.Errorf("got %+v", first)
	}
	if len(second.Ranges) != 2 || second.Ranges[1].First != a("10.0.29.240") || second.Options.MTU != 9000 || second.Options.Routes != nil ||
		string(second.Options.More[66]) != "\x0a\x0b\xff" || string(second.Options.More[119]) != "\x01a\x07example\x03org\x00\x07example\x03org\x00" {
		t.Errorf("got %+v", second)
	}
	if len(got.Reservations) != 2 || got.Reservations[0].IP != a("10.0.29.5") || string(got.Reservations[1].ClientID) != "\x01\x02\x03" {
		t.Errorf("got %+v", got.Reservations)
	}
	for _, want := range []string{
		"line 3: option domain-name-servers", "line 6: option space PXE", "line 10: next-server", "line 20: allow members", "fantasia", "class", "host nobody",
		"subnet 10.9.0.0", "if option x", "else", "use-host-decl-names", "of a host",
	} {
		if !strings.Contains(strings.Join(got.Ignored, "\n"), want) {
			t.Errorf("it does not say that it ignores %q", want)
		}
	}
	if len(got.Ignored) != 12 {
		t.Errorf("ignored %d:\n%s", len(got.Ignored), strings.Join(got.Ignored, "\n"))
	}
}

func TestConfErrorsNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"authoritative;\n}":              "line 2: a brace too many",
		"subnet 1.2.3.0 {\n\n":           "line 3: a block is not closed",
		"\noption routers 1.2.3.4":       `line 2: no semicolon after "option routers 1.2.3.4"`,
		"group { authoritative }":        "line 1: a brace too many, or no semicolon",
		strings.Repeat("group {\n", 100): "blocks are more than 64 deep",
	} {
		if _, err := ParseConf(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestImport(t *testing.T) {
	segment(t)
	c := config(t)
	s, _ := start(t, c)
	mine := ack(t, s, 9, want("192.168.10.40"))
	now := time.Now()
	lease := func(ip string, n byte, ends time.Duration) Lease {
		return Lease{IP: a(ip), MAC: mac(n), ClientID: []byte("id"), Hostname: "old", Starts: now, Ends: now.Add(ends), State: Active}
	}
	taken, err := s.Import([]Lease{
		lease("192.168.10.30", 1, time.Hour), lease("192.168.10.31", 2, -time.Hour), lease(mine, 3, time.Hour), lease("10.0.0.1", 4, time.Hour),
	}, []Reservation{{IP: a("192.168.10.9"), MAC: mac(5)}})
	if taken != 2 || err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("took %d, %v", taken, err)
	}
	again, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if got := ack(t, again, 1); got != "192.168.10.30" {
		t.Errorf("the client of an imported lease got %s", got)
	}
	if got := ack(t, again, 5); got != "192.168.10.9" {
		t.Errorf("the client of an imported reservation got %s", got)
	}
}

func FuzzConf(f *testing.F) {
	f.Add(page)
	f.Add(exportConfig(full(f)))
	f.Add(`option x code 249 = array of integer 8; subnet 10.0.0.0 netmask 255.0.0.0 { option x 1,2; option domain-search "a.b"; }`)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseConf(text)
		if err != nil {
			return
		}
		c := Config{
			DefaultLease: max(got.DefaultLease, time.Second), MaxLease: max(got.MaxLease, time.Second), MinLease: max(got.MinLease, time.Second),
			Authoritative: got.Authoritative, Subnets: got.Subnets, Reservations: got.Reservations,
		}
		again, err := ParseConf(exportConfig(c))
		if err != nil || len(again.Subnets) != len(got.Subnets) || len(again.Ignored) > 0 {
			t.Errorf("%v: %+v became %+v by\n%s", err, got, again, exportConfig(c))
		}
	})
}
