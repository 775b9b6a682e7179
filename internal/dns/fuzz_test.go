package dns

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// FuzzAnswer gives the server whatever a guest may send and an upstream may answer:
// each question gets an answer to it, which can be read and fits what it was asked by.
func FuzzAnswer(f *testing.F) {
	pack := func(name string, kind uint16, edns bool) []byte {
		q := new(dns.Msg).SetQuestion(name, kind)
		if edns {
			q.SetEdns0(1232, true)
		}
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	m := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	r, _ := dns.NewRR("example.org. 60 IN A 192.0.2.1")
	m.Answer = []dns.RR{r}
	given, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pack("vm-0.lab.internal.", dns.TypeA, false), given)
	f.Add(pack("VM-0.", dns.TypeAAAA, true), given)
	f.Add(pack("lab.internal.", dns.TypeSOA, true), given)
	f.Add(pack("4.3.2.10.in-addr.arpa.", dns.TypePTR, true), given)
	f.Add(pack("example.org.", dns.TypeA, true), given)
	f.Add([]byte{0, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0}, []byte{})
	from := netip.MustParseAddrPort("10.2.3.9:1024")
	f.Fuzz(func(t *testing.T, message, upstream []byte) {
		s := New(Config{
			Domain: "lab.internal", Server: "hub", Allow: []netip.Prefix{netip.MustParsePrefix("10.2.3.0/24")}, Log: slog.New(slog.DiscardHandler),
			Reverse: []netip.Prefix{netip.MustParsePrefix("10.2.3.0/24")},
			Lookup:  func(name string) (netip.Addr, bool) { return netip.MustParseAddr("10.2.3.4"), name == "vm-0" },
			NameOf:  func(ip netip.Addr) (string, bool) { return "vm-0", ip == netip.MustParseAddr("10.2.3.4") },
		})
		var q question
		if !q.read(message) {
			return
		}
		q.from, q.limit = from, q.size
		check := func(answer []byte) {
			t.Helper()
			m := new(dns.Msg)
			if err := m.Unpack(answer); err != nil {
				t.Fatalf("%x answers %x: %v", answer, message, err)
			}
			if m.Id != uint16(message[0])<<8|uint16(message[1]) || !m.Response || len(answer) > q.limit {
				t.Errorf("%v answers %x", m, message)
			}
		}
		answer, ok := s.quick(&q, nil, time.Now())
		if ok {
			check(answer)
			return
		}
		check(q.fail(nil, serverFailure))
		u := new(dns.Msg)
		if u.Unpack(upstream) != nil || !q.matches(u) {
			return
		}
		a, life, err := packed(&q, u)
		if err != nil {
			return
		}
		check(q.answer(nil, a, time.Now()))
		a.until = a.at.Add(life)
		s.cache.put(a)
		if answer, ok := s.quick(&q, nil, time.Now()); ok {
			check(answer)
		}
	})
}
