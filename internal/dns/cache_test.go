package dns

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// asks is a question for a name, from a client that may ask.
func asks(t testing.TB, name string, edns bool) *question {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, dns.TypeA)
	if edns {
		m.SetEdns0(1232, false)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var q question
	if !q.read(b) || q.mistake != success {
		t.Fatalf("%v is no question", m)
	}
	q.from, q.limit = netip.MustParseAddrPort("127.0.0.1:1024"), q.size
	return &q
}

// learn has the server remember an answer of one address.
func learn(t testing.TB, s *Server, name string, ttl uint32) *question {
	t.Helper()
	q := asks(t, name, true)
	m := new(dns.Msg).SetQuestion(name, dns.TypeA)
	r, err := dns.NewRR(fmt.Sprintf("%s %d IN A 192.0.2.1", name, ttl))
	if err != nil {
		t.Fatal(err)
	}
	m.Answer = []dns.RR{r}
	a, life, err := packed(q, m)
	if err != nil {
		t.Fatal(err)
	}
	a.until = a.at.Add(life)
	s.cache.put(a)
	return q
}

func newLocal() *Server {
	return New(Config{
		Domain: "lab.internal", Server: "network-hub", Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Log: slog.New(slog.DiscardHandler),
		Lookup: func(name string) (netip.Addr, bool) { return netip.MustParseAddr("192.168.10.3"), name == "host-0" },
		NameOf: func(netip.Addr) (string, bool) { return "", false },
	})
}

// TestAge: what is remembered grows old, and is then forgotten.
func TestAge(t *testing.T) {
	s := newLocal()
	q := learn(t, s, "example.org.", 60)
	for after, ttl := range map[time.Duration]uint32{0: 60, 900 * time.Millisecond: 60, 10 * time.Second: 50, 59 * time.Second: 1} {
		b, ok := s.quick(q, nil, time.Now().Add(after))
		m := new(dns.Msg)
		if err := m.Unpack(b); !ok || err != nil || len(m.Answer) != 1 || m.Answer[0].Header().Ttl != ttl || m.Id != q.id() {
			t.Errorf("after %s: %v, %v", after, m, err)
		}
	}
	if b, ok := s.quick(q, nil, time.Now().Add(61*time.Second)); ok {
		t.Errorf("after its time: %x", b)
	}
}

func (q *question) id() uint16 { return uint16(q.message[0])<<8 | uint16(q.message[1]) }

// TestFullCache: the cache has its bounds, and what is new is in it.
func TestFullCache(t *testing.T) {
	s := newLocal()
	for i := range 3 * sets * ways {
		q := learn(t, s, fmt.Sprintf("x%d.example.org.", i), 60)
		if _, ok := s.quick(q, nil, time.Now()); !ok {
			t.Fatalf("number %d is not there", i)
		}
	}
}

// TestAllocations: neither what is remembered nor what is the environment's makes garbage
// to speak of.
func TestAllocations(t *testing.T) {
	s := newLocal()
	now, b, from := time.Now(), make([]byte, 0, ourSize), netip.MustParseAddrPort("127.0.0.1:1024")
	for _, c := range []struct {
		q    *question
		most float64
	}{{learn(t, s, "example.org.", 60), 0}, {asks(t, "host-0.lab.internal.", true), 5}} {
		if n := testing.AllocsPerRun(100, func() {
			if !c.q.read(c.q.message) {
				t.Fatal("not read")
			}
			c.q.from, c.q.limit = from, c.q.size
			if _, ok := s.quick(c.q, b, now); !ok {
				t.Fatal("not answered")
			}
		}); n > c.most {
			t.Errorf("%s: %v allocations", c.q.text(), n)
		}
	}
}

func BenchmarkCached(b *testing.B) {
	s := newLocal()
	q, now, buffer := learn(b, s, "example.org.", 60), time.Now(), make([]byte, 0, ourSize)
	for b.Loop() {
		q.read(q.message)
		q.from, q.limit = netip.MustParseAddrPort("127.0.0.1:1024"), q.size
		s.quick(q, buffer, now)
	}
}

func BenchmarkLocal(b *testing.B) {
	s := newLocal()
	q, now, buffer := asks(b, "host-0.lab.internal.", true), time.Now(), make([]byte, 0, ourSize)
	for b.Loop() {
		q.read(q.message)
		q.from, q.limit = netip.MustParseAddrPort("127.0.0.1:1024"), q.size
		s.quick(q, buffer, now)
	}
}
