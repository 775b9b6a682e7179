package dhcp

import (
	"bytes"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	discover = dhcpv4.MessageTypeDiscover
	request  = dhcpv4.MessageTypeRequest
	decline  = dhcpv4.MessageTypeDecline
	release  = dhcpv4.MessageTypeRelease
	inform   = dhcpv4.MessageTypeInform
)

func TestAddressesStick(t *testing.T) {
	s, now := table(t, func(c *Config) { last(c, "192.168.10.27") })
	first, second := ack(t, s, 1), ack(t, s, 2)
	if first != "192.168.10.26" || second != "192.168.10.27" {
		t.Fatalf("got %s, %s", first, second)
	}
	if got := ack(t, s, 3); got != "" {
		t.Errorf("the range is used up, and %s was given", got)
	}
	*now = now.Add(time.Hour) // all have expired
	if got := ack(t, s, 2); got != second {
		t.Errorf("the second client got %s, not its old address", got)
	}
	if got := ack(t, s, 3); got != first {
		t.Errorf("a new client got %s, not the one longest unused", got)
	}
}

func TestRequestStates(t *testing.T) {
	none := dhcpv4.MessageTypeNone
	for _, c := range []struct {
		name         string
		mac          byte
		more         []dhcpv4.Modifier
		alone, other dhcpv4.MessageType // if authoritative, if not
	}{
		{"selecting", 1, []dhcpv4.Modifier{want("192.168.10.26"), server("192.168.10.2")}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"init-reboot", 1, []dhcpv4.Modifier{want("192.168.10.26")}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"renewing", 1, []dhcpv4.Modifier{dhcpv4.WithClientIP(net.IP{192, 168, 10, 26})}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"rebinding a free one", 1, []dhcpv4.Modifier{dhcpv4.WithClientIP(net.IP{192, 168, 10, 99}), dhcpv4.WithBroadcast(true)}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"selecting what is not ours", 2, []dhcpv4.Modifier{want("10.0.0.7"), server("192.168.10.2")}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeNak},
		{"somebody else's", 2, []dhcpv4.Modifier{want("192.168.10.26")}, dhcpv4.MessageTypeNak, none},
		{"another network, known", 1, []dhcpv4.Modifier{want("10.0.0.7")}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeNak},
		{"another network, unknown", 2, []dhcpv4.Modifier{want("10.0.0.7")}, dhcpv4.MessageTypeNak, none},
		{"the server's own", 1, []dhcpv4.Modifier{want("192.168.10.2")}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeNak},
		{"below the range", 3, []dhcpv4.Modifier{want("192.168.10.25")}, dhcpv4.MessageTypeNak, none},
		{"another server's offer", 1, []dhcpv4.Modifier{want("192.168.10.26"), server("192.168.10.9")}, none, none},
		{"nothing asked for", 1, nil, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeNak},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, authoritative := range []bool{true, false} {
				s, _ := table(t, func(c *Config) { c.Authoritative = authoritative })
				ack(t, s, 1)
				answer, out, text := exchange(t, s, newMessage(t, request, mac(c.mac), c.more...))
				got, want := none, map[bool]dhcpv4.MessageType{true: c.alone, false: c.other}[authoritative]
				if answer != nil {
					got = answer.MessageType()
				}
				if got != want {
					t.Errorf("authoritative %v: got %s, want %s", authoritative, got, want)
				}
				if (got == dhcpv4.MessageTypeAck) != (text != "") {
					t.Errorf("%s, and to the log goes %q", got, text)
				}
				if got == dhcpv4.MessageTypeNak && out.to != broadcast4 {
					t.Errorf("a NAK goes to %s", out.to)
				}
			}
		})
	}
}

// TestOneLeaseForEach: who asks for another address than it has leaves that one, so that
// nobody has them all.
func TestOneLeaseForEach(t *testing.T) {
	s, _ := table(t, func(c *Config) { last(c, "192.168.10.29") })
	ack(t, s, 1)
	for _, m := range [][]dhcpv4.Modifier{
		{want("192.168.10.27")}, // init-reboot
		{dhcpv4.WithClientIP(net.IP{192, 168, 10, 28}), dhcpv4.WithBroadcast(true)}, // rebinding
		{want("192.168.10.29"), server("192.168.10.2")},                             // selecting
	} {
		answer, _, text := exchange(t, s, newMessage(t, request, mac(1), m...))
		if answer == nil || answer.MessageType() != dhcpv4.MessageTypeAck {
			t.Fatalf("%v", answer)
		}
		active := 0
		for _, l := range s.Leases() {
			if l.State == Active {
				active++
			}
		}
		if active != 1 || strings.Count(text, "binding state free;") != 1 || strings.Count(text, "binding state active;") != 1 {
			t.Errorf("%d leases of one client, to the log goes %q", active, text)
		}
	}
	for n := range byte(3) {
		if got := ack(t, s, 2+n); got == "" {
			t.Errorf("client %d has no address", 2+n)
		}
	}
}

// What was only offered to a client that takes another address is nothing to be remembered.
func TestOfferIsNotALease(t *testing.T) {
	s, _ := table(t, nil)
	offered, _, _ := exchange(t, s, newMessage(t, discover, mac(1)))
	if answer, _, text := exchange(t, s, newMessage(t, request, mac(1), want("192.168.10.100"))); answer == nil || strings.Count(text, "lease ") != 1 {
		t.Errorf("%v, to the log goes %q", answer, text)
	}
	var log strings.Builder
	if err := s.content(&log); err != nil || strings.Contains(log.String(), offered.YourIPAddr.String()) || !strings.Contains(log.String(), "192.168.10.100") {
		t.Errorf("%v, the log has %q", err, log.String())
	}
}

// Who declines whatever it gets has not all addresses put aside.
func TestOneClientDeclinesAll(t *testing.T) {
	s, now := table(t, func(c *Config) { last(c, "192.168.10.36") })
	decline := func() string {
		ip := ack(t, s, 1)
		_, _, text := exchange(t, s, newMessage(t, decline, mac(1), want(ip), server("192.168.10.2")))
		return text
	}
	for range 20 {
		if text := decline(); !strings.Contains(text, "binding state abandoned;") && !strings.Contains(text, "binding state free;") {
			t.Fatalf("to the log goes %q", text)
		}
	}
	aside := 0
	for _, l := range s.Leases() {
		if l.State == Declined {
			aside++
		}
	}
	if aside != believed {
		t.Errorf("%d addresses are put aside", aside)
	}
	if got := ack(t, s, 2); got == "" {
		t.Error("another client has no address")
	}
	*now = now.Add(declineTime * time.Second)
	if text := decline(); !strings.Contains(text, "binding state abandoned;") {
		t.Errorf("later it is not believed: to the log goes %q", text)
	}
}

func TestOfferTakenElsewhereIsFreeAgain(t *testing.T) {
	s, _ := table(t, func(c *Config) { last(c, "192.168.10.26") })
	exchange(t, s, newMessage(t, discover, mac(1)))
	if got := ack(t, s, 2); got != "" {
		t.Fatalf("an offered address was given: %s", got)
	}
	exchange(t, s, newMessage(t, request, mac(1), want("192.168.10.26"), server("192.168.10.9")))
	if got := ack(t, s, 2); got != "192.168.10.26" {
		t.Errorf("got %q", got)
	}
}

func TestReleaseAndDecline(t *testing.T) {
	s, now := table(t, nil)
	ip := ack(t, s, 1)
	at := dhcpv4.WithClientIP(net.ParseIP(ip))
	if _, _, text := exchange(t, s, newMessage(t, release, mac(2), at)); text != "" {
		t.Errorf("another card released it: %s", text)
	}
	if _, _, text := exchange(t, s, newMessage(t, release, mac(1), at, server("192.168.10.9"))); text != "" {
		t.Errorf("a release for another server was taken: %s", text)
	}
	answer, _, text := exchange(t, s, newMessage(t, release, mac(1), at, server("192.168.10.2")))
	if answer != nil || !strings.Contains(text, "binding state free;") || s.Leases()[0].State != Released {
		t.Errorf("after a release: %v, %q, %+v", answer, text, s.Leases())
	}
	if got := ack(t, s, 1); got != ip {
		t.Errorf("it came back and got %s", got)
	}
	_, _, text = exchange(t, s, newMessage(t, decline, mac(1), want(ip), server("192.168.10.2")))
	if !strings.Contains(text, "binding state abandoned;") || strings.Contains(text, "ethernet") {
		t.Errorf("after a decline, to the log goes %q", text)
	}
	if got := ack(t, s, 1); got == ip {
		t.Error("the client got the address that it declined")
	}
	*now = now.Add(2 * declineTime * time.Second)
	if got := ack(t, s, 7, want(ip)); got != ip {
		t.Error("it is never given again")
	}
	if f := s.Facts(); f.Declines != 1 || f.Releases != 1 {
		t.Errorf("counted %+v", f.Counters)
	}
}

func TestInform(t *testing.T) {
	s, _ := table(t, nil)
	answer, out, text := exchange(t, s, newMessage(t, inform, mac(9), dhcpv4.WithClientIP(net.IP{192, 168, 10, 3})))
	if answer == nil || answer.MessageType() != dhcpv4.MessageTypeAck || text != "" {
		t.Fatalf("got %v, %q", answer, text)
	}
	if !answer.YourIPAddr.IsUnspecified() || answer.Options.Has(dhcpv4.OptionIPAddressLeaseTime) || len(answer.DNS()) != 2 {
		t.Errorf("got\n%s", answer.Summary())
	}
	if out.to != from(a("192.168.10.3")) || out.mac != [6]byte(mac(9)) {
		t.Errorf("it goes to %s", out.to)
	}
}

func TestLeaseTimes(t *testing.T) {
	s, _ := table(t, func(c *Config) { c.Subnets[0].MaxLease = time.Hour })
	for asked, want := range map[time.Duration]time.Duration{
		0: 10 * time.Minute, time.Second: time.Minute, 20 * time.Minute: 20 * time.Minute, 90 * time.Hour: time.Hour, 1<<32*time.Second - time.Second: time.Hour,
	} {
		var more []dhcpv4.Modifier
		if asked != 0 {
			more = append(more, dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(asked)))
		}
		offer, _, _ := exchange(t, s, newMessage(t, discover, mac(1), more...))
		if got := offer.IPAddressLeaseTime(0); got != want {
			t.Errorf("asked for %s: got %s, want %s", asked, got, want)
		}
		if t1, t2 := offer.IPAddressRenewalTime(0), offer.IPAddressRebindingTime(0); t1 != want/2 || t2 != (want*7/8).Truncate(time.Second) {
			t.Errorf("lease of %s is renewed after %s, %s", want, t1, t2)
		}
	}
}

func TestOptions(t *testing.T) {
	s, _ := table(t, func(c *Config) {
		c.Subnets[0].Options = Options{
			Routers: []netip.Addr{a("192.168.10.2")}, DNS: []netip.Addr{a("192.168.10.2")}, Domain: "lab.internal",
			NTP: []netip.Addr{a("192.168.10.4")}, MTU: 1450,
			Routes: []Route{{netip.MustParsePrefix("10.8.0.0/14"), a("192.168.10.5")}},
			More:   map[uint8][]byte{66: []byte("tftp.example"), 224: bytes.Repeat([]byte{7}, 300)},
		}
	})
	offer, _, _ := exchange(t, s, newMessage(t, discover, mac(1), clientID("\x01abc"),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionNTPServers, dhcpv4.OptionRouter), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500))))
	for code, want := range map[uint8]string{
		1: "\xff\xff\xff\x80", 3: "\xc0\xa8\x0a\x02", 6: "\xc0\xa8\x0a\x02", 15: "lab.internal", 42: "\xc0\xa8\x0a\x04", 26: "\x05\xaa",
		121: "\x0e\x0a\x08\xc0\xa8\x0a\x05" + "\x00\xc0\xa8\x0a\x02", 66: "tftp.example", 61: "\x01abc", 224: strings.Repeat("\x07", 300),
	} {
		if got := offer.Options.Get(dhcpv4.GenericOptionCode(code)); string(got) != want {
			t.Errorf("option %d: got %x, want %x", code, got, want)
		}
	}
	small, out, _ := exchange(t, s, newMessage(t, discover, mac(2)))
	if len(out.b) > 576-28 || len(small.DNS()) != 1 {
		t.Errorf("without a size, %d bytes were sent:\n%s", len(out.b), small.Summary())
	}
	for name, o := range map[string]Options{
		"the server's own": {More: map[uint8][]byte{54: {1, 2, 3, 4}}}, "twice": {Domain: "x", More: map[uint8][]byte{15: []byte("y")}},
		"IPv6": {DNS: []netip.Addr{a("::1")}}, "small MTU": {MTU: 60}, "IPv6 route": {Routes: []Route{{netip.MustParsePrefix("::/0"), a("::1")}}},
	} {
		c := config(t)
		c.Subnets[0].Options = o
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestReservations(t *testing.T) {
	s, _ := table(t, func(c *Config) {
		c.Reservations = []Reservation{
			{IP: a("192.168.10.10"), MAC: mac(1)}, {IP: a("192.168.10.11"), ClientID: []byte("\x01two")}, {IP: a("192.168.10.26"), Name: "DB"},
		}
	})
	if got := ack(t, s, 1); got != "192.168.10.10" {
		t.Errorf("by MAC: got %s", got)
	}
	if got := ack(t, s, 2, clientID("\x01two")); got != "192.168.10.11" {
		t.Errorf("by client identifier: got %s", got)
	}
	if got := ack(t, s, 4, want("192.168.10.26")); got != "192.168.10.27" {
		t.Errorf("a client of no name got %s", got)
	}
	if got := ack(t, s, 3, dhcpv4.WithOption(dhcpv4.OptHostName("db"))); got != "192.168.10.26" {
		t.Errorf("by name: got %s", got)
	}
	answer, _, _ := exchange(t, s, newMessage(t, request, mac(1), want("192.168.10.99")))
	if answer.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("a client with a reservation got another address: %s", answer.Summary())
	}
}

// An address that somebody has without asking is given to nobody else; who has a lease of it
// keeps that.
func TestTaken(t *testing.T) {
	taken := map[netip.Addr]net.HardwareAddr{a("192.168.10.26"): mac(9)}
	s, now := table(t, func(c *Config) {
		c.Taken = func(ip netip.Addr, card net.HardwareAddr) bool {
			return taken[ip] != nil && !bytes.Equal(taken[ip], card)
		}
	})
	if got := ack(t, s, 1); got != "192.168.10.27" {
		t.Errorf("the first gets %s", got)
	}
	if got := ack(t, s, 2, want("192.168.10.26")); got != "192.168.10.28" {
		t.Errorf("who asks for it gets %s", got)
	}
	if got := ack(t, s, 9, want("192.168.10.26")); got != "192.168.10.26" {
		t.Errorf("whose it is gets %s", got)
	}
	taken[a("192.168.10.27")] = mac(8)
	if got := ack(t, s, 1); got != "192.168.10.27" {
		t.Errorf("who had it before gets %s", got)
	}
	*now = now.Add(24 * time.Hour)
	if got := ack(t, s, 1); got == "192.168.10.27" {
		t.Error("a lease that has ended is renewed")
	}
}

// A microVM has its address by whatever card it has, and nobody else has it.
func TestReservationOfMicroVM(t *testing.T) {
	cards := map[string]string{mac(1).String(): "default/web", mac(5).String(): "default/db"}
	s, _ := table(t, func(c *Config) {
		c.MicroVM = func(mac net.HardwareAddr) string { return cards[mac.String()] }
		c.Reservations = []Reservation{{IP: a("192.168.10.30"), MicroVM: "default/web"}}
	})
	if got := ack(t, s, 2, want("192.168.10.30"), dhcpv4.WithOption(dhcpv4.OptHostName("web"))); got == "192.168.10.30" || got == "" {
		t.Errorf("somebody else got %q", got)
	}
	if got := ack(t, s, 1); got != "192.168.10.30" {
		t.Errorf("got %s", got)
	}
	if l := only(s, mac(1)); !l.Reserved || l.MicroVM != "default/web" || l.State != Active {
		t.Errorf("its lease is %+v", l)
	}
	// Made anew, it has another card, and the old one's lease has ended.
	delete(cards, mac(1).String())
	cards[mac(3).String()] = "default/web"
	s.mu.Lock()
	s.release(s.leases[from(a("192.168.10.30"))])
	s.mu.Unlock()
	if got := ack(t, s, 1, want("192.168.10.30")); got == "192.168.10.30" {
		t.Error("the old card got it again")
	}
	if got := ack(t, s, 3); got != "192.168.10.30" {
		t.Errorf("with another card: got %s", got)
	}
	answer, _, _ := exchange(t, s, newMessage(t, request, mac(3), want("192.168.10.99")))
	if answer.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("it got another address: %s", answer.Summary())
	}
	// What it has already may be reserved for a microVM, and not for another one.
	ip := ack(t, s, 5)
	for _, c := range []struct {
		of   string
		want bool
	}{{"default/web", false}, {"team/none", false}, {"default/db", true}} {
		s.mu.Lock()
		m, err := Reservation{MicroVM: c.of}.asMessage()
		if err != nil {
			t.Fatal(err)
		}
		if got := s.free(s.pool(s.own), from(a(ip)), m, true); got != c.want {
			t.Errorf("%s may have %s: %v", c.of, ip, got)
		}
		s.mu.Unlock()
	}
}

// A configuration that reserves what was reserved by hand has it; the server starts.
func TestConfiguredReservationComesFirst(t *testing.T) {
	c := config(t)
	text := header + string(formatReservation(nil, Reservation{IP: a("192.168.10.50"), MAC: mac(1)})) +
		string(formatReservation(nil, Reservation{IP: a("192.168.10.51"), MAC: mac(2)}))
	if err := os.WriteFile(c.LeaseFile, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c.Reservations = []Reservation{{IP: a("192.168.10.50"), MicroVM: "default/web"}}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.load(); err != nil {
		t.Fatal(err)
	}
	all := s.Leases()
	if len(all) != 2 || all[0].MicroVM != "default/web" || len(all[0].MAC) != 0 || !bytes.Equal(all[1].MAC, mac(2)) {
		t.Errorf("got %+v", all)
	}
}

func TestReservedAddressInUseIsNotGivenTwice(t *testing.T) {
	s, now := table(t, nil)
	ip := ack(t, s, 1)
	s.booked.add(Reservation{IP: a(ip), MAC: mac(2)}) // as a changed configuration does
	if got := ack(t, s, 2); got == ip || got == "" {
		t.Fatalf("its owner got %q while another client has it", got)
	}
	answer, _, _ := exchange(t, s, newMessage(t, request, mac(1), dhcpv4.WithClientIP(net.ParseIP(ip))))
	if answer.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("the other client could keep it")
	}
	*now = now.Add(time.Hour)
	if got := ack(t, s, 2); got != ip {
		t.Errorf("once it is free, its owner got %s", got)
	}
}

func TestClientIdentifiers(t *testing.T) {
	byMAC, now := table(t, nil)
	first := ack(t, byMAC, 1, clientID("image"))
	if got := ack(t, byMAC, 2, clientID("image")); got == first {
		t.Error("two copies of an image share an address")
	}
	if got := ack(t, byMAC, 1, clientID("other")); got != first {
		t.Errorf("a card got %s after its client identifier changed", got)
	}
	*now = now.Add(time.Hour)
	if got := ack(t, byMAC, 3, clientID("other")); got != first {
		t.Errorf("a machine with a new card got %s", got)
	}
}

func TestRelays(t *testing.T) {
	s, _ := table(t, func(c *Config) {
		c.Subnets = append(c.Subnets, Subnet{
			Prefix: netip.MustParsePrefix("10.7.0.0/24"), Ranges: []Range{{a("10.7.0.10"), a("10.7.0.11")}, {a("10.7.0.100"), a("10.7.0.100")}},
			Exclude: []netip.Prefix{netip.MustParsePrefix("10.7.0.11/32")}, Options: Options{Routers: []netip.Addr{a("10.7.0.1")}},
		}, Subnet{Prefix: netip.MustParsePrefix("10.8.0.0/24"), Ranges: []Range{{a("10.8.0.10"), a("10.8.0.20")}}})
	})
	relay := dhcpv4.WithRelay(net.IP{10, 7, 0, 1})
	agent := dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.AgentCircuitIDSubOption, []byte("port 7"))))
	offer, out, _ := exchange(t, s, newMessage(t, discover, mac(1), relay, agent))
	if offer.YourIPAddr.String() != "10.7.0.10" || offer.Router()[0].String() != "10.7.0.1" || offer.SubnetMask().String() != "ffffff00" {
		t.Errorf("got\n%s", offer.Summary())
	}
	if !out.relay || !out.route || out.to != from(a("10.7.0.1")) || !offer.GatewayIPAddr.Equal(net.IP{10, 7, 0, 1}) {
		t.Errorf("it goes to %s", out.to)
	}
	if got := offer.RelayAgentInfo(); got == nil || string(got.Get(dhcpv4.AgentCircuitIDSubOption)) != "port 7" {
		t.Errorf("option 82 is not echoed:\n%s", offer.Summary())
	}
	end := bytes.LastIndexByte(bytes.TrimRight(out.b, "\x00"), optionEnd)
	if tail := out.b[end-10 : end]; tail[0] != optionAgent {
		t.Errorf("option 82 is not the last: % x", tail)
	}
	if got := ack(t, s, 1, relay); got != "10.7.0.10" {
		t.Errorf("got %s", got)
	}
	if got := ack(t, s, 2, relay); got != "10.7.0.100" {
		t.Errorf("the second range: got %s", got)
	}
	if got := ack(t, s, 3, relay); got != "" {
		t.Errorf("an excluded address was given: %s", got)
	}
	nak, out, _ := exchange(t, s, newMessage(t, request, mac(3), relay, want("192.168.10.30")))
	if nak.MessageType() != dhcpv4.MessageTypeNak || !nak.IsBroadcast() || out.to != from(a("10.7.0.1")) {
		t.Errorf("got %s to %s", nak.Summary(), out.to)
	}
	renewed, out, _ := exchange(t, s, newMessage(t, request, mac(1), dhcpv4.WithClientIP(net.IP{10, 7, 0, 10})))
	if renewed.MessageType() != dhcpv4.MessageTypeAck || !out.route || out.relay || out.to != from(a("10.7.0.10")) {
		t.Errorf("a renewal through a router: %s to %s", renewed.Summary(), out.to)
	}
	if answer, _, _ := exchange(t, s, newMessage(t, discover, mac(4), dhcpv4.WithRelay(net.IP{10, 99, 0, 1}))); answer != nil {
		t.Errorf("a relay of no subnet of ours got\n%s", answer.Summary())
	}
	link := dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(
		dhcpv4.OptGeneric(dhcpv4.LinkSelectionSubOption, []byte{10, 8, 0, 0}), dhcpv4.OptGeneric(dhcpv4.ServerIdentifierOverrideSubOption, []byte{10, 8, 0, 1})))
	offer, _, _ = exchange(t, s, newMessage(t, discover, mac(5), relay, link))
	if offer.YourIPAddr.String() != "10.8.0.10" || !offer.ServerIdentifier().Equal(net.IP{10, 8, 0, 1}) {
		t.Errorf("with a link and a server that the relay chose, got\n%s", offer.Summary())
	}
	if got := ack(t, s, 5, relay, link); got != "10.8.0.10" {
		t.Errorf("got %s", got)
	}
}

func TestWhereAnswersGo(t *testing.T) {
	s, _ := table(t, nil)
	_, out, _ := exchange(t, s, newMessage(t, discover, mac(1)))
	if out.to != from(a("192.168.10.26")) || out.mac != [6]byte(mac(1)) || out.route {
		t.Errorf("to %s, % x", out.to, out.mac)
	}
	_, out, _ = exchange(t, s, newMessage(t, discover, mac(1), dhcpv4.WithBroadcast(true)))
	if out.to != broadcast4 || out.mac != broadcastMAC {
		t.Errorf("to %s, % x", out.to, out.mac)
	}
}

func TestExhaustionIsSaidOnce(t *testing.T) {
	var log bytes.Buffer
	s, now := table(t, func(c *Config) {
		last(c, "192.168.10.26")
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	ack(t, s, 1)
	for n := range byte(20) {
		ack(t, s, 2+n)
	}
	if got := strings.Count(log.String(), "no free address is left"); got != 1 || s.Facts().Exhausted != 20 {
		t.Errorf("%d lines, counted %d:\n%s", got, s.Facts().Exhausted, log.String())
	}
	*now = now.Add(2 * time.Minute)
	ack(t, s, 30)
	if !strings.Contains(log.String(), `repeated="19 times"`) {
		t.Errorf("got\n%s", log.String())
	}
}

func TestFacts(t *testing.T) {
	s, _ := table(t, func(c *Config) { c.Reservations = []Reservation{{IP: a("192.168.10.40"), MAC: mac(9)}} })
	if f := s.Facts(); f.Active != 0 || f.Free != 100 {
		t.Errorf("at first: %d active, %d free", f.Active, f.Free)
	}
	ack(t, s, 1)
	ack(t, s, 9)
	if f := s.Facts(); f.Active != 2 || f.Free != 99 || f.Acks != 2 || f.Offers != 2 || f.Received[kindDiscover] != 2 || f.Received[kindRequest] != 2 ||
		f.States[Active] != 2 || f.Kept != 1 {
		t.Errorf("then: %+v", f)
	}
	if all := s.Leases(); len(all) != 2 || all[0].State != Active || all[1].State != Active {
		t.Errorf("leases: %+v", all)
	}
}

func TestConfigMistakes(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no subnet":            func(c *Config) { c.Subnets = nil },
		"range outside":        func(c *Config) { last(c, "192.168.10.200") },
		"range backwards":      func(c *Config) { last(c, "192.168.10.20") },
		"two subnets, one net": func(c *Config) { c.Subnets = append(c.Subnets, c.Subnets[0]) },
		"two ranges, one net":  func(c *Config) { c.Subnets[0].Ranges = append(c.Subnets[0].Ranges, c.Subnets[0].Ranges[0]) },
		"server outside":       func(c *Config) { c.Server = a("10.0.0.1") },
		"lease times":          func(c *Config) { c.MaxLease = time.Second },
		"IPv6":                 func(c *Config) { c.Subnets[0].Prefix = netip.MustParsePrefix("fd00::/64") },
		"reserved twice": func(c *Config) {
			c.Reservations = []Reservation{{IP: a("192.168.10.9"), MAC: mac(1)}, {IP: a("192.168.10.9"), MAC: mac(2)}}
		},
		"the server's reserved": func(c *Config) { c.Reservations = []Reservation{{IP: a("192.168.10.2"), MAC: mac(1)}} },
	} {
		c := config(t)
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Who has a name keeps it for as long as the lease, through a restart too.
func TestFirstKeepsItsName(t *testing.T) {
	called := func(name string) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptHostName(name)) }
	s, now := table(t, nil)
	is := func(name, ip string) {
		t.Helper()
		got, ok := s.Lookup(name)
		if ok != (ip != "") || ok && got != a(ip) {
			t.Errorf("%s is %v, want %q", name, got, ip)
		}
	}
	first, second := ack(t, s, 1, called("db")), ack(t, s, 2, called("DB"))
	is("db", first)
	ack(t, s, 1, called("db")) // its entry in the log is the newer one now
	if name, ok := s.NameOf(a(first)); !ok || name != "db" {
		t.Errorf("%s is %q", first, name)
	}
	if name, ok := s.NameOf(a(second)); ok {
		t.Errorf("%s is %q", second, name)
	}
	if err := os.WriteFile(s.c.LeaseFile, logOf(t, s), 0o644); err != nil {
		t.Fatal(err)
	}
	s = loaded(t, s.c)
	is("DB", first)
	*now = now.Add(6 * time.Minute)
	ack(t, s, 2, called("db"))
	is("db", first)
	*now = now.Add(6 * time.Minute) // the first has not renewed
	is("db", "")
	ack(t, s, 2, called("db"))
	is("db", second)
	ack(t, s, 2, called("web"))
	is("db", "")
	is("web", second)
	for _, odd := range []string{"a.b", "-x", "x_y", "$(id)", "\x00", strings.Repeat("x", 64)} {
		ack(t, s, 3, called(odd))
		is(odd, "")
	}
	if l := only(s, mac(3)); l.Hostname != "a.b" {
		t.Errorf("the lease of a client with odd names has %q", l.Hostname)
	}
}

// logOf is the whole log of a server that does not run.
func logOf(t *testing.T, s *Server) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.content(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A forger fills the list of other servers only for a while.
func TestForeignServersAreForgotten(t *testing.T) {
	s, now := table(t, nil)
	for n := range addr4(2 * maxForeign) {
		s.heard(Foreign{Server: (1 + n).netip(), MAC: mac(byte(n))})
	}
	if n := len(s.Facts().Foreign); n != maxForeign {
		t.Errorf("%d servers are remembered", n)
	}
	*now = now.Add(foreignStale)
	s.heard(Foreign{Server: addr4(100).netip(), MAC: mac(100)})
	if f := s.Facts().Foreign; len(f) != 1 || f[0].Server != addr4(100).netip() {
		t.Errorf("later: %+v", f)
	}
}
