package dhcp

import (
	"bytes"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

func TestParse(t *testing.T) {
	p := newMessage(t, request, mac(1), want("192.168.10.30"), server("192.168.10.2"), clientID("\x01abc"),
		dhcpv4.WithOption(dhcpv4.OptHostName("box")), dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(90*time.Second)),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(900)), dhcpv4.WithRequestedOptions(dhcpv4.OptionRouter, dhcpv4.OptionNTPServers))
	m, err := parse(p.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	if m.kind != kindRequest || m.requested != from(a("192.168.10.30")) || m.server != from(a("192.168.10.2")) || string(m.id) != "\x01abc" ||
		string(m.hostname) != "box" || m.lease != 90 || m.maxSize != 900 || !bytes.Contains(m.parameters, []byte{3, 42}) || m.mac != [6]byte(mac(1)) {
		t.Errorf("got %+v", m)
	}
}

// Options go on in the fields of the file and server names (RFC 2131, section 4.1).
func TestParseOverload(t *testing.T) {
	b := newMessage(t, discover, mac(1)).ToBytes()
	b = append(b[:headerSize+4], optionKind, 1, byte(kindDiscover), optionOverload, 1, 3, optionHostname, 1, 'o', optionEnd)
	copy(b[108:], []byte{optionHostname, 1, 'n', optionEnd})
	copy(b[44:], []byte{optionPad, optionHostname, 1, 'e', optionEnd})
	m, err := parse(b)
	if err != nil || string(m.hostname) != "one" || m.kind != kindDiscover {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestParseRefuses(t *testing.T) {
	good := newMessage(t, discover, mac(1)).ToBytes()
	for name, change := range map[string]func([]byte) []byte{
		"short":          func(b []byte) []byte { return b[:239] },
		"a reply":        func(b []byte) []byte { b[0] = 2; return b },
		"another medium": func(b []byte) []byte { b[1] = 32; return b },
		"a long card":    func(b []byte) []byte { b[2] = 16; return b },
		"no cookie":      func(b []byte) []byte { b[236] = 0; return b },
		"a cut option":   func(b []byte) []byte { return append(b[:240], 53, 4, 1) },
		"a bare option":  func(b []byte) []byte { return append(b[:240], 53) },
	} {
		if _, err := parse(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// FuzzPacket gives the server anything, and has another implementation read what
// it answers.
func FuzzPacket(f *testing.F) {
	for _, p := range []*dhcpv4.DHCPv4{
		newMessage(f, discover, mac(1)), newMessage(f, request, mac(1), want("192.168.10.26")),
		newMessage(f, request, mac(1), dhcpv4.WithClientIP([]byte{192, 168, 10, 26}), clientID("x")),
		newMessage(f, decline, mac(1), want("192.168.10.26")), newMessage(f, inform, mac(1), dhcpv4.WithClientIP([]byte{192, 168, 10, 26})),
		newMessage(f, discover, mac(1), dhcpv4.WithRelay([]byte{192, 168, 10, 9}), dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.LinkSelectionSubOption, []byte{192, 168, 10, 0})))),
	} {
		f.Add(p.ToBytes())
	}
	s, _ := table(f, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			t.Skip()
		}
		var out reply
		_, text := s.handle(&m, &out, nil)
		if len(out.b) > 0 {
			answer, err := dhcpv4.FromBytes(out.b)
			if err != nil {
				t.Fatalf("%x is answered %x: %v", b, out.b, err)
			}
			if ip := answer.YourIPAddr; !ip.IsUnspecified() && (!s.pools[0].dynamic(from(mustAddr(ip))) || out.to == 0) {
				t.Errorf("%s is given to %s", ip, out.to)
			}
			if got := answer.Options.Get(dhcpv4.OptionRelayAgentInformation); len(m.agent) < 256 && !bytes.Equal(got, m.agent) {
				t.Errorf("option 82 %x came back as %x", m.agent, got)
			}
		}
		if book := parseBook(header + string(text)); !book.clean || len(text) > 0 && len(book.leases) != 1 {
			t.Errorf("to the log goes %q", text)
		}
	})
}
