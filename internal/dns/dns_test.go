package dns_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"ingot/internal/dns"
)

// freePort is one that nobody has, neither over UDP nor over TCP.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	for range 100 {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		at := netip.MustParseAddrPort(c.LocalAddr().String())
		l, err := net.Listen("tcp", at.String())
		c.Close()
		if err == nil {
			l.Close()
			return at
		}
	}
	t.Fatal("no port is free over both UDP and TCP")
	return netip.AddrPort{}
}

// upstream is a real DNS server that knows one name and counts its questions.
func upstream(t *testing.T, rcode int) (string, *atomic.Int32) {
	t.Helper()
	var asked atomic.Int32
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &mdns.Server{PacketConn: c, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		asked.Add(1)
		m := new(mdns.Msg).SetRcode(q, rcode)
		if rcode == mdns.RcodeSuccess {
			r, _ := mdns.NewRR("example.org. 60 IN A 192.0.2.1")
			m.Answer = []mdns.RR{r}
		}
		w.WriteMsg(m)
	})}
	go s.ActivateAndServe()
	t.Cleanup(func() { s.Shutdown() })
	return c.LocalAddr().String(), &asked
}

func serve(t *testing.T, c dns.Config) string {
	t.Helper()
	at, _ := serveCounted(t, c)
	return at
}

// serveCounted is serve, and what the server counts.
func serveCounted(t *testing.T, c dns.Config) (string, func() dns.Answers) {
	t.Helper()
	at := freePort(t)
	c.Listen = []netip.AddrPort{at}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Allow == nil {
		c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	}
	s := dns.New(c)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	select {
	case <-s.Ready():
	case err := <-ended:
		cancel()
		t.Fatalf("serve at %s: %v", at, err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return at.String(), func() dns.Answers { return s.Facts().Answers }
}

func ask(t *testing.T, server, network, name string, kind uint16) *mdns.Msg {
	t.Helper()
	m, _, err := (&mdns.Client{Net: network, Timeout: 5 * time.Second}).Exchange(new(mdns.Msg).SetQuestion(name, kind), server)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestForwardsAndCaches(t *testing.T) {
	up, asked := upstream(t, mdns.RcodeSuccess)
	bad, _ := upstream(t, mdns.RcodeServerFailure)
	at := serve(t, dns.Config{Upstreams: []string{bad, up}})
	for _, network := range []string{"udp", "tcp", "udp"} {
		m := ask(t, at, network, "eXample.org.", mdns.TypeA)
		if m.Rcode != mdns.RcodeSuccess || len(m.Answer) != 1 {
			t.Fatalf("%s: %v", network, m)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

func TestLocalNames(t *testing.T) {
	ip := netip.MustParseAddr("192.168.10.3")
	up, asked := upstream(t, mdns.RcodeSuccess)
	at := serve(t, dns.Config{
		Domain: "lab.internal", Server: "network-hub", Reverse: []netip.Prefix{netip.MustParsePrefix("192.168.10.0/25")}, Upstreams: []string{up},
		Lookup: func(name string) (netip.Addr, bool) {
			switch name {
			case "host-0", "web.team":
				return ip, true
			case "stopped", "team":
				return netip.Addr{}, true
			}
			return netip.Addr{}, false
		},
		NameOf: func(a netip.Addr) (string, bool) { return "host-0", a == ip },
	})
	const nothing = "lab.internal. 5 IN SOA network-hub.lab.internal. hostmaster.lab.internal."
	for _, c := range []struct {
		name   string
		kind   uint16
		code   int
		answer string // how the first record begins
		ns     string // likewise
	}{
		{"host-0.lab.internal.", mdns.TypeA, 0, "host-0.lab.internal. 5 IN A 192.168.10.3", ""},
		{"HOST-0.lab.Internal.", mdns.TypeA, 0, "HOST-0.lab.Internal. 5 IN A 192.168.10.3", ""},
		{"host-0.", mdns.TypeA, 0, "host-0. 5 IN A 192.168.10.3", ""},
		{"web.team.lab.internal.", mdns.TypeANY, 0, "web.team.lab.internal. 5 IN A 192.168.10.3", ""},
		{"host-0.lab.internal.", mdns.TypeAAAA, 0, "", nothing},
		{"host-0.", mdns.TypeAAAA, 0, "", ""},
		{"stopped.lab.internal.", mdns.TypeA, 0, "", nothing},
		{"stopped.", mdns.TypeA, 0, "", ""},
		{"team.lab.internal.", mdns.TypeA, 0, "", nothing},
		{"other.lab.internal.", mdns.TypeA, mdns.RcodeNameError, "", nothing},
		{"x.host-0.lab.internal.", mdns.TypeAAAA, mdns.RcodeNameError, "", nothing},
		{`a\.b.lab.internal.`, mdns.TypeA, mdns.RcodeNameError, "", nothing},
		{"lab.internal.", mdns.TypeA, 0, "", nothing},
		{"lab.internal.", mdns.TypeSOA, 0, nothing, ""},
		{"lab.internal.", mdns.TypeNS, 0, "lab.internal. 5 IN NS network-hub.lab.internal.", ""},
		{"3.10.168.192.in-addr.arpa.", mdns.TypePTR, 0, "3.10.168.192.in-addr.arpa. 5 IN PTR host-0.lab.internal.", ""},
		{"3.10.168.192.in-addr.arpa.", mdns.TypeA, 0, "", "10.168.192.in-addr.arpa. 5 IN SOA"},
		{"4.10.168.192.in-addr.arpa.", mdns.TypePTR, mdns.RcodeNameError, "", "10.168.192.in-addr.arpa. 5 IN SOA"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			m := ask(t, at, network, c.name, c.kind)
			first := func(all []mdns.RR) string {
				if len(all) == 0 {
					return ""
				}
				return strings.ReplaceAll(all[0].String(), "\t", " ")
			}
			if m.Rcode != c.code || !strings.HasPrefix(first(m.Answer), c.answer) || (c.answer == "") != (len(m.Answer) == 0) ||
				!strings.HasPrefix(first(m.Ns), c.ns) || (c.ns == "") != (len(m.Ns) == 0) || !m.Authoritative || !m.RecursionAvailable {
				t.Errorf("%s %s by %s: %v", c.name, mdns.TypeToString[c.kind], network, m)
			}
			for _, r := range m.Ns {
				if soa, ok := r.(*mdns.SOA); !ok || soa.Minttl != 5 {
					t.Errorf("%s may be missed otherwise than for 5 s: %v", c.name, r)
				}
			}
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the upstream was asked %d times", n)
	}
	// Of others' addresses and names others know.
	for _, name := range []string{"200.10.168.192.in-addr.arpa.", "nobody.", "notlab.internal."} {
		if m := ask(t, at, "udp", name, mdns.TypePTR); m.Authoritative {
			t.Errorf("%s: %v", name, m)
		}
	}
	if n := asked.Load(); n != 3 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// A client that asks without end has no more descriptors than its share, says
// little in the log, and knows nothing of what the upstream is asked.
// record is a log that is read while the server goes on writing.
type record struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (r *record) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(b)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func TestOneClientCantUseAllUp(t *testing.T) {
	const id, many = 7, 100
	var asked, known atomic.Int32
	hold := make(chan bool)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	up := &mdns.Server{PacketConn: c, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		asked.Add(1)
		if q.Id == id {
			known.Add(1)
		}
		<-hold
		w.WriteMsg(new(mdns.Msg).SetRcode(q, mdns.RcodeServerFailure))
	})}
	go up.ActivateAndServe()
	t.Cleanup(func() { up.Shutdown() })
	var log record
	at := serve(t, dns.Config{
		Upstreams: []string{c.LocalAddr().String()}, Domain: "lab.internal", Log: slog.New(slog.NewTextHandler(&log, nil)),
		Lookup: func(string) (netip.Addr, bool) { return netip.MustParseAddr("192.168.10.3"), true },
	})
	client, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(10 * time.Second))
	for n := range many {
		q := new(mdns.Msg).SetQuestion(fmt.Sprintf("x%d.example.org.", n), mdns.TypeA)
		q.Id = id
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		client.Write(b)
	}
	refused := 0
	for b := make([]byte, 512); refused < many-16; refused++ { // what is asked above the share is answered at once
		if _, err := client.Read(b); err != nil {
			t.Fatalf("after %d answers: %v", refused, err)
		}
	}
	if m := ask(t, at, "udp", "host-0.lab.internal.", mdns.TypeA); len(m.Answer) != 1 {
		t.Errorf("meanwhile: %v", m)
	}
	close(hold)
	for range 16 {
		if _, err := client.Read(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
	if n := asked.Load(); n != 16 {
		t.Errorf("the upstream was asked %d times", n)
	}
	if n := known.Load(); n > 1 {
		t.Errorf("the client knew the id of %d questions", n)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log:\n%s", n, log.String())
	}
}

func TestRefusesStrangersAndFailsFast(t *testing.T) {
	at := serve(t, dns.Config{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	if m := ask(t, at, "udp", "example.org.", mdns.TypeA); m.Rcode != mdns.RcodeRefused {
		t.Errorf("got %v", m)
	}
	at = serve(t, dns.Config{})
	if m := ask(t, at, "udp", "example.org.", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure {
		t.Errorf("got %v", m)
	}
}

// Each question is counted once, by where its answer came from.
func TestAnswersAreCounted(t *testing.T) {
	up, _ := upstream(t, mdns.RcodeSuccess)
	bad, _ := upstream(t, mdns.RcodeServerFailure)
	at, counted := serveCounted(t, dns.Config{
		Upstreams: []string{up}, Domain: "lab.internal",
		Lookup: func(name string) (netip.Addr, bool) { return netip.MustParseAddr("192.168.10.3"), name == "host-0" },
		NameOf: func(netip.Addr) (string, bool) { return "", false },
	})
	for _, name := range []string{"host-0.lab.internal.", "nobody.lab.internal.", "example.org.", "example.org.", "example.org."} {
		ask(t, at, "udp", name, mdns.TypeA)
	}
	if got, want := counted(), (dns.Answers{Own: 2, Forwarded: 1, Cached: 2}); got != want {
		t.Errorf("counted %+v, not %+v", got, want)
	}
	at, counted = serveCounted(t, dns.Config{Upstreams: []string{bad}})
	ask(t, at, "tcp", "example.org.", mdns.TypeA)
	if got, want := counted(), (dns.Answers{Failed: 1}); got != want {
		t.Errorf("counted %+v, not %+v", got, want)
	}
	at, counted = serveCounted(t, dns.Config{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	ask(t, at, "udp", "example.org.", mdns.TypeA)
	if got, want := counted(), (dns.Answers{Refused: 1}); got != want {
		t.Errorf("counted %+v, not %+v", got, want)
	}
}

func TestSystemUpstreams(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	stub := write("stub", "nameserver 127.0.0.53\noptions edns0\n")
	real := write("real", "# x\nnameserver 192.0.2.7\nnameserver 2001:db8::1\n")
	got, err := dns.SystemUpstreams(stub, real)
	if err != nil || !slices.Equal(got, []string{"192.0.2.7:53", "[2001:db8::1]:53"}) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := dns.SystemUpstreams(stub); err == nil || !strings.Contains(err.Error(), "loopback") {
		t.Errorf("got %v", err)
	}
}
