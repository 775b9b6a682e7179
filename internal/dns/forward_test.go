package dns_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"ingot/internal/dns"
)

// upstreamOf is a DNS server over UDP and TCP that answers with a function.
func upstreamOf(t *testing.T, answer func(network string, q *mdns.Msg) *mdns.Msg) string {
	t.Helper()
	return upstreamBy(t, func(w mdns.ResponseWriter, q *mdns.Msg) {
		if m := answer(w.RemoteAddr().Network(), q); m != nil {
			w.WriteMsg(m)
		}
	})
}

// upstreamBy is a DNS server over UDP and TCP that handles each question itself.
func upstreamBy(t *testing.T, handle mdns.HandlerFunc) string {
	t.Helper()
	at := freePort(t).String()
	packet, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*mdns.Server{{PacketConn: packet}, {Listener: stream}} {
		s.Handler = handle
		started := make(chan bool)
		s.NotifyStartedFunc = func() { close(started) }
		go s.ActivateAndServe()
		<-started
		t.Cleanup(func() { s.Shutdown() })
	}
	return at
}

// addresses is an answer of so many records.
func addresses(q *mdns.Msg, n int) *mdns.Msg {
	m := new(mdns.Msg).SetReply(q)
	for i := range n {
		m.Answer = append(m.Answer, &mdns.A{
			Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, byte(i)),
		})
	}
	return m
}

// TestSizes: what does not fit is asked for by TCP, of us and by us.
func TestSizes(t *testing.T) {
	up := upstreamOf(t, func(network string, q *mdns.Msg) *mdns.Msg {
		var n int
		fmt.Sscanf(q.Question[0].Name, "n%d.", &n)
		m := addresses(q, n)
		if network == "udp" {
			m.Truncate(int(q.IsEdns0().UDPSize()))
		}
		return m
	})
	at := serve(t, dns.Config{Upstreams: []string{up}})
	for _, c := range []struct {
		n         int
		edns      uint16
		truncated bool
	}{{20, 0, false}, {40, 0, true}, {40, 512, true}, {40, 1232, false}, {40, 65535, false}, {200, 65535, true}} {
		q := new(mdns.Msg).SetQuestion(fmt.Sprintf("n%d.example.org.", c.n), mdns.TypeA)
		if c.edns > 0 {
			q.SetEdns0(c.edns, false)
		}
		for range 2 { // forwarded, and from the cache
			m, _, err := (&mdns.Client{UDPSize: 65535}).Exchange(q, at)
			if err != nil {
				t.Fatal(err)
			}
			if m.Truncated != c.truncated || !m.Truncated && len(m.Answer) != c.n || m.Truncated && len(m.Answer) > 0 || (m.IsEdns0() != nil) != (c.edns > 0) {
				t.Errorf("%d records with EDNS %d: %d records, truncated %v, EDNS %v", c.n, c.edns, len(m.Answer), m.Truncated, m.IsEdns0())
			}
		}
		if m, _, err := (&mdns.Client{Net: "tcp"}).Exchange(q, at); err != nil || m.Truncated || len(m.Answer) != c.n {
			t.Errorf("%d records by TCP: %d, %v", c.n, len(m.Answer), err)
		}
	}
}

// TestDeadUpstream: one that is silent costs a moment, once; and so does a lost packet.
func TestDeadUpstream(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	gone := freePort(t).String()
	up := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg { return addresses(q, 1) })
	for _, upstreams := range [][]string{{silent.LocalAddr().String(), up}, {gone, up}, {gone, silent.LocalAddr().String(), up}} {
		at := serve(t, dns.Config{Upstreams: upstreams})
		for i, most := range []time.Duration{1500 * time.Millisecond, 400 * time.Millisecond} {
			began := time.Now()
			m := ask(t, at, "udp", fmt.Sprintf("x%d.example.org.", i), mdns.TypeA)
			if took := time.Since(began); len(m.Answer) != 1 || took > most {
				t.Errorf("question %d: %v after %s", i, m, took)
			}
		}
	}
	var asked atomic.Int32
	lossy := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg {
		if asked.Add(1) == 1 {
			return nil
		}
		return addresses(q, 1)
	})
	if m := ask(t, serve(t, dns.Config{Upstreams: []string{lossy}}), "udp", "example.org.", mdns.TypeA); len(m.Answer) != 1 {
		t.Errorf("after a lost packet: %v", m)
	}
}

// TestAnswersOfOthers: what is not an answer to the question is none.
func TestAnswersOfOthers(t *testing.T) {
	for name, spoil := range map[string]func(m *mdns.Msg){
		"id":       func(m *mdns.Msg) { m.Id++ },
		"name":     func(m *mdns.Msg) { m.Question[0].Name = "example.com." },
		"type":     func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeMX },
		"question": func(m *mdns.Msg) { m.Question = nil },
		"request":  func(m *mdns.Msg) { m.Response = false },
	} {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			b := make([]byte, 512)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				q := new(mdns.Msg)
				q.Unpack(b[:n])
				bad, good := addresses(q, 2), addresses(q, 1)
				spoil(bad)
				for _, m := range []*mdns.Msg{bad, good} {
					b, _ := m.Pack()
					c.WriteTo(b, from)
				}
			}
		}()
		at := serve(t, dns.Config{Upstreams: []string{c.LocalAddr().String()}})
		if m := ask(t, at, "udp", "example.org.", mdns.TypeA); len(m.Answer) != 1 {
			t.Errorf("another %s: %v", name, m)
		}
	}
}

// TestSameQuestions are forwarded once, also when they come at the same time.
func TestSameQuestions(t *testing.T) {
	var asked atomic.Int32
	hold, last := make(chan struct{}), make(chan struct{}, 1)
	up := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg {
		if q.Question[0].Name == "last.example.org." {
			signal(last)
			return addresses(q, 1)
		}
		asked.Add(1)
		heard(hold)
		return addresses(q, 1)
	})
	at := serve(t, dns.Config{Upstreams: []string{up}})
	c, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const same = 5
	for i := range same + 1 { // one after the other, on one socket
		name := "example.org."
		if i == same {
			name = "last.example.org."
		}
		b, err := new(mdns.Msg).SetQuestion(name, mdns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	heard(last) // so those before it are there
	close(hold)
	for range same + 1 {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// TestFlags are what a resolver may see of another's answer, and of strange questions.
func TestFlags(t *testing.T) {
	up := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg {
		m := addresses(q, 1)
		m.AuthenticatedData, m.Authoritative = true, true
		m.SetEdns0(4096, true)
		if !q.RecursionDesired {
			m.Rcode = mdns.RcodeRefused
		}
		return m
	})
	at := serve(t, dns.Config{Upstreams: []string{up}})
	for name, c := range map[string]struct {
		ask  func(q *mdns.Msg)
		want func(m *mdns.Msg) bool
	}{
		"plain": {func(*mdns.Msg) {}, func(m *mdns.Msg) bool { return !m.AuthenticatedData && m.IsEdns0() == nil && len(m.Answer) == 1 }},
		"AD":    {func(q *mdns.Msg) { q.AuthenticatedData = true }, func(m *mdns.Msg) bool { return m.AuthenticatedData && m.IsEdns0() == nil }},
		"DO":    {func(q *mdns.Msg) { q.SetEdns0(4096, true) }, func(m *mdns.Msg) bool { return m.AuthenticatedData && m.IsEdns0().Do() }},
		"case": {func(q *mdns.Msg) { q.Question[0].Name = "eXample.org." }, func(m *mdns.Msg) bool {
			return m.Question[0].Name == "eXample.org." && m.Answer[0].Header().Name == "eXample.org."
		}},
		"no RD":   {func(q *mdns.Msg) { q.RecursionDesired = false }, func(m *mdns.Msg) bool { return !m.RecursionDesired && len(m.Answer) == 1 }},
		"version": {func(q *mdns.Msg) { q.SetEdns0(1232, false); q.IsEdns0().SetVersion(1) }, func(m *mdns.Msg) bool { return m.Rcode == mdns.RcodeBadVers }},
		"opcode":  {func(q *mdns.Msg) { q.Opcode = mdns.OpcodeNotify }, func(m *mdns.Msg) bool { return m.Rcode == mdns.RcodeNotImplemented }},
		"two":     {func(q *mdns.Msg) { q.Question = append(q.Question, q.Question[0]) }, func(m *mdns.Msg) bool { return m.Rcode == mdns.RcodeFormatError }},
		"AXFR":    {func(q *mdns.Msg) { q.Question[0].Qtype = mdns.TypeAXFR }, func(m *mdns.Msg) bool { return m.Rcode == mdns.RcodeRefused }},
	} {
		for range 2 {
			q := new(mdns.Msg).SetQuestion("example.org.", mdns.TypeA)
			c.ask(q)
			m, _, err := (&mdns.Client{Timeout: 5 * time.Second}).Exchange(q, at)
			if err != nil || m.Authoritative || !m.RecursionAvailable || !c.want(m) {
				t.Errorf("%s: %v, %v", name, m, err)
			}
		}
	}
}

// TestNegative: that a name is not there is remembered as long as its zone says.
func TestNegative(t *testing.T) {
	var asked atomic.Int32
	up := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg {
		asked.Add(1)
		m := new(mdns.Msg).SetRcode(q, mdns.RcodeNameError)
		if strings.Contains(q.Question[0].Name, "soa") {
			soa, _ := mdns.NewRR("example.org. 600 IN SOA a.example.org. b.example.org. 1 2 3 4 300")
			m.Ns = []mdns.RR{soa}
		}
		return m
	})
	at := serve(t, dns.Config{
		Upstreams: []string{up}, Domain: "lab.internal", Lookup: func(string) (netip.Addr, bool) { return netip.Addr{}, false },
	})
	for _, c := range []struct {
		name string
		n    int32
	}{{"soa.example.org.", 1}, {"without.example.org.", 3}, {"soa.", 3}} { // the last may be a microVM's soon
		asked.Store(0)
		for range 3 {
			if m := ask(t, at, "udp", c.name, mdns.TypeA); m.Rcode != mdns.RcodeNameError {
				t.Errorf("%s: %v", c.name, m)
			}
		}
		if n := asked.Load(); n != c.n {
			t.Errorf("%s was asked for %d times, not %d", c.name, n, c.n)
		}
	}
}

// TestManyOnOneConnection: questions that come at once over TCP are all answered.
func TestManyOnOneConnection(t *testing.T) {
	at := serve(t, dns.Config{Upstreams: []string{upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg { return addresses(q, 1) })}})
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	c := &mdns.Conn{Conn: conn}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	for i := range 20 {
		q := new(mdns.Msg).SetQuestion(fmt.Sprintf("x%d.example.org.", i/2), mdns.TypeA)
		q.Id = uint16(i)
		if err := c.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		if m, err := c.ReadMsg(); err != nil || m.Id != uint16(i) || len(m.Answer) != 1 {
			t.Fatalf("answer %d: %v, %v", i, m, err)
		}
	}
}

// signal is for whoever waits, now or later; a second one is the first.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// heard waits for a signal, but not for ever: a handler that does keeps its server.
func heard(c chan struct{}) {
	select {
	case <-c:
	case <-time.After(2 * time.Second):
	}
}

// TestNextMessageAmidAnother: a connection's next message comes while what an upstream said
// too late is still being read. It has no part in the question before it.
func TestNextMessageAmidAnother(t *testing.T) {
	const clients = 8 // as many as one may have
	name := func(i int) string { return fmt.Sprintf("n%d.%sexample.org.", i, strings.Repeat("x.", 100)) }
	asked, wrote := map[string]chan struct{}{}, map[string]chan struct{}{}
	for i := range clients {
		asked[name(i)], wrote[name(i)] = make(chan struct{}, 1), make(chan struct{}, 1)
	}
	first := upstreamBy(t, func(w mdns.ResponseWriter, q *mdns.Msg) {
		m := addresses(q, 4000) // which take a while to read
		m.Compress = true
		if w.RemoteAddr().Network() == "udp" {
			m.Truncate(mdns.MinMsgSize)
			w.WriteMsg(m)
			return
		}
		b, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		heard(asked[q.Question[0].Name])
		w.Write(b)
		signal(wrote[q.Question[0].Name])
	})
	second := upstreamBy(t, func(w mdns.ResponseWriter, q *mdns.Msg) {
		signal(asked[q.Question[0].Name])
		heard(wrote[q.Question[0].Name])
		w.WriteMsg(addresses(q, 1))
	})
	at := serve(t, dns.Config{Upstreams: []string{first, second}})
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			c, err := mdns.DialTimeout("tcp", at, 5*time.Second)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			if err := c.WriteMsg(new(mdns.Msg).SetQuestion(name(i), mdns.TypeA)); err != nil {
				t.Error(err)
			}
			if m, err := c.ReadMsg(); err != nil || len(m.Answer) == 0 {
				t.Errorf("%s: %v, %v", name(i), m, err)
			}
			if _, err := c.Write([]byte("short")); err != nil {
				t.Error(err)
			}
			if m, err := c.ReadMsg(); err == nil {
				t.Errorf("what is no question is answered: %v", m)
			}
		})
	}
	group.Wait()
	if m := ask(t, at, "tcp", name(0), mdns.TypeA); len(m.Answer) == 0 {
		t.Errorf("afterwards: %v", m)
	}
}

// TestShortMessages: a part of a question is answered with an error, or not at all, by TCP
// as by UDP.
func TestShortMessages(t *testing.T) {
	up := upstreamOf(t, func(_ string, q *mdns.Msg) *mdns.Msg { return addresses(q, 1) })
	at := serve(t, dns.Config{Upstreams: []string{up}})
	whole, err := new(mdns.Msg).SetQuestion("a.example.org.", mdns.TypeA).SetEdns0(1232, true).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"tcp", "udp"} {
		for n := 1; n < len(whole); n++ {
			c, err := mdns.DialTimeout(network, at, time.Second)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if n < 12 && network == "udp" { // no answer: that of the next message comes first
				c.Write(whole[:n])
				c.Write(whole)
			} else {
				c.Write(whole[:n])
			}
			m, err := c.ReadMsg()
			switch want := mdns.RcodeFormatError; {
			case n < 12 && network == "tcp":
				if err == nil {
					t.Errorf("%s, %d bytes: %v", network, n, m)
				}
			case n < 12:
				want = mdns.RcodeSuccess
				fallthrough
			default:
				if err != nil || m.Rcode != want {
					t.Errorf("%s, %d bytes: %v, %v", network, n, m, err)
				}
			}
			c.Close()
		}
	}
}
