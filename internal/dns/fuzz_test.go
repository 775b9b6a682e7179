package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// FuzzAnswer gives the server whatever a guest may send and an upstream may answer:
// each question gets an answer to it, which fits what it was asked by.
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
	answer := new(dns.Msg).SetQuestion("example.org.", dns.TypeA)
	r, _ := dns.NewRR("example.org. 60 IN A 192.0.2.1")
	answer.Answer = []dns.RR{r}
	given, err := answer.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pack("vm-0.lab.internal.", dns.TypeA, false), given)
	f.Add(pack("VM-0.", dns.TypeAAAA, true), given)
	f.Add(pack("4.3.2.10.in-addr.arpa.", dns.TypePTR, true), given)
	f.Add(pack("example.org.", dns.TypeA, true), given)
	f.Add([]byte{0, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0}, []byte{})
	from := &net.UDPAddr{IP: net.IPv4(10, 2, 3, 9), Port: 1024}
	f.Fuzz(func(t *testing.T, question, answer []byte) {
		s := New(Config{
			Domain: "lab.internal", Allow: []netip.Prefix{netip.MustParsePrefix("10.2.3.0/24")}, Log: slog.New(slog.DiscardHandler),
			Lookup: func(name string) (netip.Addr, bool) { return netip.MustParseAddr("10.2.3.4"), name == "vm-0" },
			NameOf: func(ip netip.Addr) (string, bool) { return "vm-0", ip == netip.MustParseAddr("10.2.3.4") },
		})
		q := new(dns.Msg)
		if q.Unpack(question) != nil {
			return // the library answers these
		}
		m := s.answer(context.Background(), from, q) // without an upstream
		if m.Id != q.Id || !m.Response {
			t.Errorf("%v answers %v", m, q)
		}
		if m.Truncate(dns.MinMsgSize); m.Len() > dns.MinMsgSize && !m.Truncated && len(m.Answer) > 0 {
			t.Errorf("%d bytes", m.Len())
		}
		if u := new(dns.Msg); u.Unpack(answer) == nil && len(q.Question) == 1 {
			key := questionOf(q)
			s.keep(key, u)
			if kept := s.lookup(key, q); kept != nil && kept.Id != q.Id {
				t.Errorf("a kept answer has id %d, and was asked with %d", kept.Id, q.Id)
			}
		}
	})
}
