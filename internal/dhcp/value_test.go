package dhcp

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ingot/internal/need"
)

func TestParseOption(t *testing.T) {
	for _, c := range []struct {
		code        uint8
		kind, words string // separated by |
		want, err   string
	}{
		{66, "", "tftp.example.org", "tftp.example.org", ""},
		{66, "text", "0a:01", "0a:01", ""},
		{66, "hex", "0a:1", "\x0a\x01", ""},
		{224, "hex", "07ff", "\x07\xff", ""},
		{224, "uint16", "1|0x102", "\x00\x01\x01\x02", ""},
		{224, "uint8", "1|,|2", "", `option 224: "1, ,, 2" is not numbers from 0 to 255`},
		{2, "", "-3600", "\xff\xff\xf1\xf0", ""},
		{4, "", "10.0.0.1|10.0.0.2", "\x0a\x00\x00\x01\x0a\x00\x00\x02", ""},
		{19, "", "true", "\x01", ""},
		{33, "addresses", "10.0.0.1|10.0.0.2", "\x0a\x00\x00\x01\x0a\x00\x00\x02", ""},
		{119, "", "a.example|b.example", "\x01a\x07example\x00\x01b\x07example\x00", ""},
		{53, "uint8", "1", "", "option 53: the server itself decides about it"},
		{0, "text", "x", "", "option 0: the server itself decides about it"},
		{224, "", "x", "", "option 224: nothing is known of its form: it needs a type, addresses, domains, flag, hex, int32, text, uint16, uint32, uint8"},
		{66, "string", "x", "", `option 66: type "string" is none of addresses, domains, flag, hex, int32, text, uint16, uint32, uint8`},
		{66, "", "a|b", "", `option 66: "a, b" is not a text`},
		{66, "text", "", "", `option 66: "" is not a text`},
		{224, "hex", "7", "", `option 224: "7" is not bytes, such as 0a:00:01`},
		{23, "", "256", "", `option 23: "256" is not a number from 0 to 255`},
		{23, "uint8", "1|2", "", "option 23: it has to be a number from 0 to 255 (RFC 2132), and this has 2 bytes"},
		{28, "hex", "0a:00:00", "", "option 28: it has to be an IPv4 address (RFC 2132), and this has 3 bytes"},
		{4, "hex", "0a:00:00:01:02", "", "option 4: it has to be IPv4 addresses (RFC 2132), and this has 5 bytes"},
		{4, "", "ntp.example.org", "", `option 4: "ntp.example.org" is not IPv4 addresses`},
		{33, "", "10.0.0.1", "", "option 33: it has to be IPv4 addresses (RFC 2132), and this has 4 bytes"},
		{19, "uint8", "2", "", "option 19: it has to be true or false (RFC 2132), and this has 1 bytes"},
		{119, "", "a..b", "", `option 119: "a..b" is not names, such as lab.example.org`},
	} {
		got, err := ParseOption(c.code, c.kind, strings.Split(c.words, "|"))
		if c.err == "" && (err != nil || string(got) != c.want) || c.err != "" && (err == nil || !strings.HasPrefix(err.Error(), c.err+": ")) {
			t.Errorf("%d %s %q: %q, %v, want %q %s", c.code, c.kind, c.words, got, err, c.want, c.err)
		}
	}
}

// What is understood of an option can be sent, and dhcpd's form of it is read as the same.
func FuzzOption(f *testing.F) {
	for _, kind := range append(ValueKinds(), "") {
		f.Add(uint8(224), kind, "10.0.0.1")
		f.Add(uint8(43), kind, "0a:00")
		f.Add(uint8(119), kind, "example.org")
	}
	f.Fuzz(func(t *testing.T, code uint8, kind, text string) {
		value, err := ParseOption(code, kind, strings.Fields(text))
		if err != nil {
			return
		}
		o := Options{More: map[uint8][]byte{code: value}}
		all, err := o.encode()
		if err != nil || len(all) != 1 || all[0].code != code || !bytes.Equal(all[0].value, value) {
			t.Fatalf("sent as %v, %v", all, err)
		}
		if form, known := formOf(code); known && !form.fits(code, value) {
			t.Errorf("option %d is %x", code, value)
		}
	})
}

// Clients of one network hear the same from dhcpd, with what we export for it, as from us.
func TestExportIsTrue(t *testing.T) {
	need.Binary(t, "dhcpd")
	need.Binary(t, "busybox")
	segment(t)
	c := full(t)
	c.Subnets = c.Subnets[:1]
	c.Subnets[0].Options.Domain = "lab.internal"
	c.Subnets[0].Options.More = map[uint8][]byte{2: {0xff, 0xff, 0xf1, 0xf0}, 66: []byte("tftp"), 119: []byte("\x03far\x07example\x00"), 224: {7, 0}}
	c.Reservations = []Reservation{{IP: a("192.168.10.11"), ClientID: []byte("\x01two")}}
	heard := func() string {
		return sh(t, in+"busybox udhcpc -i cli -C -x 61:0174776f -n -q -f -t 5 -T 1 -O timezone -O ntpsrv -O mtu -O search -O staticroutes -O tftp -O 224 -s "+
			script(t, "env | grep -Ei '^(ip|lease|router|dns|domain|search|ntpsrv|mtu|staticroutes|tftp|timezone|opt224)='")+" 2>&1 | grep = | sort")
	}
	_, stop := start(t, c)
	ours := heard()
	stop()
	for _, want := range []string{"ip=192.168.10.11\n", "lease=600\n", "mtu=1450\n", "ntpsrv=192.168.10.4\n", "opt224=0700\n", "search=far.example\n",
		"staticroutes=10.8.0.0/14 192.168.10.5 0.0.0.0/0 192.168.10.2\n", "tftp=tftp\n", "timezone=4294963696\n"} {
		if !strings.Contains(ours, want) {
			t.Errorf("no %q in\n%s", want, ours)
		}
	}
	leases := filepath.Join(t.TempDir(), "leases")
	if err := os.WriteFile(leases, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	dhcpd := exec.Command("dhcpd", "-4", "-f", "-q", "-cf", c.ConfigFile, "-lf", leases, "-pf", leases+".pid", "srv")
	var out output
	dhcpd.Stdout, dhcpd.Stderr = &out, &out
	if err := dhcpd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { dhcpd.Process.Kill(); dhcpd.Wait() }()
	if theirs := heard(); theirs != ours {
		t.Errorf("from dhcpd:\n%s\nfrom us:\n%s\n%s\n%s", theirs, ours, out.String(), read(t, c.ConfigFile))
	}
}
