package dhcp

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"ingot/internal/need"
)

func parseBook(text string) book {
	r := newBookReader()
	r.read(text)
	return r.finish()
}

func TestLogRoundTrip(t *testing.T) {
	r := record{
		ip: from(a("192.168.10.26")), mac: [6]byte(mac(1)), id: "\x01\x00\"\\; lease", hostname: `re"lease;bot`,
		starts: 1700000000, ends: 1700000600, place: nowhere, logged: true,
	}
	kept := Reservation{IP: a("192.168.10.50"), MAC: mac(2), MicroVM: "team/lease.web", ClientID: []byte("\xff\x00"), Name: "db"}
	lease := string(formatRecord(nil, &r))
	text := lease + string(formatReservation(nil, kept))
	for cut := range len(text) + 1 { // torn anywhere
		b := parseBook(text[:cut])
		if got := len(b.leases) == 1; got != (cut >= len(lease)-1) || got && *b.leases[r.ip] != r { // but for the last newline
			t.Fatalf("cut at %d: %+v", cut, b.leases)
		}
	}
	b := parseBook(text)
	if len(b.reserved) != 1 || !reflect.DeepEqual(b.reserved[0], kept) || b.clean {
		t.Errorf("got %+v", b)
	}
	if b := parseBook(text + string(formatUnreserved(nil, kept))); len(b.reserved) != 0 {
		t.Errorf("still reserved: %+v", b.reserved)
	}
	for _, whole := range []string{header, header + text} {
		if !parseBook(whole).clean || parseBook(whole+"lease 1.2.3.4 {").clean || parseBook(whole+lease+lease).clean {
			t.Errorf("not known as clean, or dirty: %q", whole)
		}
	}
}

// A crash may leave any part of what was not acknowledged, and zeros.
func TestTornEntryHidesNoOther(t *testing.T) {
	first, second := record{ip: 1 << 24, mac: [6]byte(mac(1))}, record{ip: 2 << 24, mac: [6]byte(mac(2))}
	whole, next := string(formatRecord(nil, &first)), string(formatRecord(nil, &second))
	for cut := range len(whole) - 2 {
		for _, gap := range []string{"", "\n", "\x00\x00\x00\x00", "\x00\n"} {
			if strings.HasSuffix(whole[:cut]+gap, `"`) {
				continue
			}
			b := parseBook(whole[:cut] + gap + next)
			if cut > 0 && gap == "" && !strings.ContainsAny(whole[cut-1:cut], " ;\n{}") {
				continue // two words became one
			}
			if len(b.leases) != 1 || b.leases[second.ip] == nil {
				t.Errorf("cut at %d, %q: %+v", cut, gap, b.leases)
			}
		}
	}
}

const dhcpdsOwn = `# The format of this file is documented in the dhcpd.leases(5) manual page.
# This lease file was written by isc-dhcp-4.4.3-P1

# authoring-byte-order entry is generated, DO NOT DELETE
authoring-byte-order little-endian;

server-duid "\000\001\000\001*\344";

lease 192.168.10.30 {
  starts 5 2022/10/28 10:40:00;
  ends never;
  cltt 5 2022/10/28 10:40:00;
  binding state active;
  next binding state free;
  rewind binding state free;
  hardware ethernet aa:35:eb:d4:61:b1;
  uid "\001\2525\353\324a\261";
  set vendor-class-identifier = "x";
  on expiry { execute("a", "b;}"); }
  client-hostname "mvm0";
}
lease 192.168.10.31 {
  starts epoch 1666953600; # Fri Oct 28 10:40:00 2022
  ends epoch 1666954200; # Fri Oct 28 10:50:00 2022
  tstp 5 2022/10/28 10:50:00;
  binding state free;
  hardware ethernet AA:35:EB:D4:61:B2;
}
lease 192.168.10.32 {
  starts 5 2022/10/28 10:40:00;
  ends 5 2022/10/28 10:40:00;
  binding state abandoned;
}
host kept {
  dynamic;
  hardware ethernet aa:35:eb:d4:61:b9;
  fixed-address 192.168.10.9;
}
`

func TestReadsDhcpdsOwnLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dhcpd.leases")
	if err := os.WriteFile(path, []byte(dhcpdsOwn), 0o644); err != nil {
		t.Fatal(err)
	}
	all, err := ReadLeases(path)
	if err != nil || len(all) != 3 {
		t.Fatalf("got %+v, %v", all, err)
	}
	if l := all[0]; l.Hostname != "mvm0" || l.MAC.String() != "aa:35:eb:d4:61:b1" || l.Ends.Year() != 9999 || l.State != Active {
		t.Errorf("got %+v", l)
	}
	if l := all[1]; l.State != Released || l.MAC.String() != "aa:35:eb:d4:61:b2" || l.Ends != time.Unix(1666954200, 0).UTC() {
		t.Errorf("got %+v", l)
	}
	if l := all[2]; l.State != Expired {
		t.Errorf("got %+v", l)
	}
	if b := parseBook(dhcpdsOwn); len(b.reserved) != 1 || b.clean {
		t.Errorf("got %+v", b)
	}
}

// leaseList is isc-dhcp-server's own script.
func leaseList(t *testing.T, path string, flags ...string) string {
	t.Helper()
	need.Binary(t, "dhcp-lease-list")
	out, err := exec.Command("dhcp-lease-list", append([]string{"--parsable", "--lease", path}, flags...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestScriptReadsOurLog(t *testing.T) {
	now := time.Now().Unix()
	path := filepath.Join(t.TempDir(), "dhcpd.leases")
	text := []byte(header)
	for i, r := range []record{
		{hostname: "mvm0", id: "ethernet 00:00:00;"},
		{hostname: "release-bot", id: "lease", unnamed: true},
		{state: stateReleased, hostname: "gone"},
		{state: stateDeclined},
		{},
	} {
		r.ip, r.mac, r.starts, r.ends = from(a("192.168.10.26"))+addr4(i), [6]byte(mac(0xa0+byte(i))), now, now+600
		if r.state == stateReleased {
			r.ends = now - 1
		}
		text = formatRecord(text, &r)
	}
	text = formatReservation(text, Reservation{IP: a("192.168.10.9"), MAC: mac(9)})
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	got := leaseList(t, path)
	for _, want := range []string{
		"MAC 02:00:00:00:00:a0 IP 192.168.10.26 HOSTNAME mvm0 ", `MAC 02:00:00:00:00:a1 IP 192.168.10.27 HOSTNAME re\154ease-bot `,
		"MAC 02:00:00:00:00:a4 IP 192.168.10.30 HOSTNAME -NA- ", "END " + time.Unix(now+600, 0).UTC().Format("2006-01-02 15:04:05"),
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if n := strings.Count(got, "MAC "); n != 3 {
		t.Errorf("%d leases are shown, not 3:\n%s", n, got)
	}
}

func FuzzBook(f *testing.F) {
	f.Add(string(formatRecord(nil, &record{ip: 1, mac: [6]byte(mac(1)), hostname: "x"})))
	f.Add("lease 1.2.3.4 { hardware ethernet 02:00:00:00:00:01; uid \"\\")
	f.Add("host x{fixed-address 1.2.3.4;hardware ethernet 02:00:00:00:00:01;}")
	f.Add(dhcpdsOwn)
	f.Add(string(formatRecord(nil, &record{ip: 1, mac: [6]byte(mac(1)), hostname: "x", unnamed: true})))
	f.Add("lease 0.0.0.0 { hardware ethernet 02:00:00:00:00:01; }")
	f.Fuzz(func(t *testing.T, text string) {
		b := parseBook(text)
		for _, r := range b.leases {
			r := *r
			again := parseBook(header + string(formatRecord(nil, &r)))
			if r.state == stateDeclined {
				r.mac, r.id, r.hostname, r.unnamed = [6]byte{}, "", "", false
			}
			if len(again.leases) != 1 || *again.leases[r.ip] != r || !again.clean {
				t.Errorf("%+v became %+v", r, again)
			}
		}
		for _, r := range b.reserved {
			again := parseBook(header + string(formatReservation(nil, r)))
			if len(again.reserved) != 1 || !again.reserved[0].equal(r) || !again.clean {
				t.Errorf("%+v became %+v", r, again)
			}
		}
	})
}

// A log that is whole is written on; one that is torn is written anew.
func TestCleanLogIsKnown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dhcpd.leases")
	lease := string(formatRecord(nil, &record{ip: 1, mac: [6]byte(mac(1))}))
	for text, want := range map[string]bool{
		"": false, header: true, header + lease: true, header + lease[:20]: false, header + lease + lease: false, lease: false,
		header + string(formatReservation(nil, Reservation{IP: a("192.168.10.9"), MAC: mac(9)})): true,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if b, err := readBook(path); err != nil || b.clean != want {
			t.Errorf("%q: clean is %v, %v", text, b.clean, err)
		}
	}
}

// A client that has several records is the one of the newest, whatever comes
// first: here its old one is outside of a range that was changed.
func TestNewestRecordOfACardWins(t *testing.T) {
	now := time.Now().Unix()
	old := record{ip: from(a("192.168.10.20")), mac: [6]byte(mac(1)), state: stateReleased, starts: now - 100, ends: now - 50}
	current := record{ip: from(a("192.168.10.60")), mac: [6]byte(mac(1)), starts: now - 200, ends: now + 600}
	c := config(t)
	text := formatRecord(formatRecord([]byte(header), &current), &old)
	if err := os.WriteFile(c.LeaseFile, text, 0o644); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if got := ack(t, loaded(t, c), 1); got != "192.168.10.60" {
			t.Fatalf("after a restart, the client got %s", got)
		}
	}
}
