package dhcp

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// A machine that never had an isc-dhcp-server has no directories for its files.
func TestExportsAreThePages(t *testing.T) {
	c := config(t)
	c.Interface = "bond0.1000"
	c.ConfigFile, c.DefaultsFile = filepath.Join(t.TempDir(), "etc/dhcp/dhcpd.conf"), filepath.Join(t.TempDir(), "etc/default/isc-dhcp-server")
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
		{IP: a("192.168.10.12"), MicroVM: "default/web"},
	}
	return c
}

func TestExportLeavesOutWhatIsExcluded(t *testing.T) {
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

// Whoever reads an export while it is written again sees all of it.
func TestExportsAreReplacedAtOnce(t *testing.T) {
	c := config(t)
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.export(); err != nil {
		t.Fatal(err)
	}
	exported := make(chan error, 1)
	go func() {
		for range 2000 {
			if err := s.export(); err != nil {
				exported <- err
				return
			}
		}
		exported <- nil
	}()
	for {
		select {
		case err := <-exported:
			if err != nil {
				t.Error(err)
			}
			if left, err := filepath.Glob(c.ConfigFile + "?*"); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			return
		default:
			if got := read(t, c.ConfigFile); got != page {
				t.Fatalf("got %q", got)
			}
		}
	}
}
