// Package dns answers the names of an environment's machines, and forwards all
// other questions to the resolvers of the machine, with a small cache. It serves
// only the prefixes that it is told to: it is never an open resolver.
package dns

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

// Config says what a server answers.
type Config struct {
	Listen    []netip.AddrPort
	Allow     []netip.Prefix // who may ask
	Upstreams []string       // host:port; asked in turn
	Domain    string         // of the environment's names: lab.internal
	Log       *slog.Logger

	// Lookup is the address of a short name, in lower case, and NameOf the short
	// name of an address.
	Lookup func(name string) (netip.Addr, bool)
	NameOf func(netip.Addr) (string, bool)
}

const (
	upstreamTimeout = 2 * time.Second
	maxCached       = 4096
	maxTTL          = time.Hour
	localTTL        = 10 // seconds
	quietTime       = time.Minute

	// Beside it are the hub's other services: guests must not use up its
	// descriptors. Each forwarded question and each TCP connection has one.
	maxForwarded, maxForwardedEach = 256, 16
	maxStreams, maxStreamsEach     = 128, 8
)

// Server is a DNS server. New only allocates.
type Server struct {
	c       Config
	ready   chan struct{}
	serving atomic.Bool
	good    atomic.Int32 // the upstream that answered last

	forwarded *run.Quota

	mu     sync.Mutex // guards all below
	cache  map[question]cached
	failed int       // questions that no line in the log tells of
	quiet  time.Time // until then there is none
}

type question struct {
	name  string
	kind  uint16
	class uint16
	edns  bool
	do    bool // DNSSEC records wanted
	cd    bool // and not checked
}

type cached struct {
	answer *dns.Msg
	at     time.Time
	until  time.Time
}

// New prepares a server.
func New(c Config) *Server {
	return &Server{c: c, ready: make(chan struct{}), cache: map[question]cached{}, forwarded: run.NewQuota(maxForwarded, maxForwardedEach)}
}

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "dns" }

// Facts are the server's state.
type Facts struct {
	Serving   bool
	Listen    []netip.AddrPort
	Upstreams []string
}

// Facts says how the server is.
func (s *Server) Facts() Facts {
	return Facts{Serving: s.serving.Load(), Listen: s.c.Listen, Upstreams: s.c.Upstreams}
}

// Run serves over UDP and TCP until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	var started sync.WaitGroup
	streams := run.NewQuota(maxStreams, maxStreamsEach)
	for _, at := range s.c.Listen {
		var packet net.PacketConn
		err := run.Patiently(ctx, unix.EADDRINUSE, func() (err error) {
			packet, err = net.ListenPacket("udp", at.String())
			return err
		})
		if err != nil {
			return fmt.Errorf("serve DNS: %w", err)
		}
		defer packet.Close()
		stream, err := run.Listen(ctx, net.ListenConfig{}, "tcp", at.String())
		if err != nil {
			return fmt.Errorf("serve DNS: %w", err)
		}
		defer stream.Close()
		stream = run.Limit(stream, streams)
		for _, server := range []*dns.Server{{PacketConn: packet}, {Listener: stream}} {
			server.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { s.serve(ctx, w, q) })
			started.Add(1)
			server.NotifyStartedFunc = started.Done
			group.Go(server.ActivateAndServe)
			group.Go(func() error {
				<-ctx.Done()
				return server.ShutdownContext(context.WithoutCancel(ctx))
			})
		}
	}
	started.Wait()
	s.serving.Store(true)
	defer s.serving.Store(false)
	close(s.ready)
	return group.Wait()
}

func (s *Server) serve(ctx context.Context, w dns.ResponseWriter, q *dns.Msg) {
	answer := s.answer(ctx, w.RemoteAddr(), q)
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
		}
		answer.Truncate(size)
	}
	if err := w.WriteMsg(answer); err != nil {
		s.c.Log.Debug("send DNS answer", "err", err)
	}
}

func (s *Server) answer(ctx context.Context, from net.Addr, q *dns.Msg) *dns.Msg {
	if !s.allowed(from) {
		return failure(q, dns.RcodeRefused)
	}
	if len(q.Question) != 1 {
		return failure(q, dns.RcodeFormatError)
	}
	if m := s.local(q); m != nil {
		return m
	}
	key := questionOf(q)
	if m := s.lookup(key, q); m != nil {
		return m
	}
	give, ok := s.forwarded.Take(from)
	if !ok {
		s.warn("too many DNS questions at one time", "from", from.String())
		return failure(q, dns.RcodeServerFailure)
	}
	defer give()
	m, err := s.forward(ctx, upward(q))
	if err != nil {
		s.warn("forward DNS question", "name", key.name, "err", err)
		return failure(q, dns.RcodeServerFailure)
	}
	s.keep(key, m)
	m.Id = q.Id
	return m
}

// questionOf is what an answer is kept by.
func questionOf(q *dns.Msg) question {
	key := question{name: strings.ToLower(q.Question[0].Name), kind: q.Question[0].Qtype, class: q.Question[0].Qclass, cd: q.CheckingDisabled}
	if o := q.IsEdns0(); o != nil {
		key.edns, key.do = true, o.Do()
	}
	return key
}

// upward is a question as the upstreams get it. The answer will be others', too:
// whoever asks must not know its id, nor add what it is to depend on.
func upward(q *dns.Msg) *dns.Msg {
	u := q.Copy()
	u.Id = dns.Id()
	u.Answer, u.Ns, u.Extra = nil, nil, nil
	if o := q.IsEdns0(); o != nil {
		u.SetEdns0(dns.DefaultMsgSize, o.Do())
	}
	return u
}

// warn tells of a question that has failed, but not of each.
func (s *Server) warn(message string, args ...any) {
	s.mu.Lock()
	now := time.Now()
	if now.Before(s.quiet) {
		s.failed++
		s.mu.Unlock()
		return
	}
	if s.failed > 0 {
		args = append(args, "repeated", s.failed)
	}
	s.failed, s.quiet = 0, now.Add(quietTime)
	s.mu.Unlock()
	s.c.Log.Warn(message, args...)
}

func failure(q *dns.Msg, code int) *dns.Msg {
	return new(dns.Msg).SetRcode(q, code)
}

func (s *Server) allowed(from net.Addr) bool {
	at, err := netip.ParseAddrPort(from.String())
	return err == nil && slices.ContainsFunc(s.c.Allow, func(p netip.Prefix) bool { return p.Contains(at.Addr().Unmap()) })
}

// local answers names of the environment: NAME.DOMAIN, NAME alone, and back.
func (s *Server) local(q *dns.Msg) *dns.Msg {
	if s.c.Lookup == nil {
		return nil
	}
	asked := q.Question[0]
	name := strings.ToLower(strings.TrimSuffix(asked.Name, "."))
	if ip, ok := reversed(name); ok && asked.Qtype == dns.TypePTR {
		if short, ok := s.c.NameOf(ip); ok {
			return s.found(q, &dns.PTR{Hdr: heading(asked, dns.TypePTR), Ptr: dns.Fqdn(short + "." + s.c.Domain)})
		}
		return nil
	}
	short, ours := strings.CutSuffix(name, "."+s.c.Domain)
	if !ours && strings.Contains(name, ".") {
		return nil
	}
	ip, ok := s.c.Lookup(short)
	switch {
	case !ok && !ours:
		return nil
	case !ok:
		return failure(q, dns.RcodeNameError)
	case asked.Qtype == dns.TypeA:
		return s.found(q, &dns.A{Hdr: heading(asked, dns.TypeA), A: ip.AsSlice()})
	}
	return s.found(q)
}

// reversed is the address that a name like 2.10.168.192.in-addr.arpa asks for.
func reversed(name string) (netip.Addr, bool) {
	name, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	parts := strings.Split(name, ".")
	slices.Reverse(parts)
	ip, err := netip.ParseAddr(strings.Join(parts, "."))
	return ip, err == nil && ip.Is4()
}

func (s *Server) found(q *dns.Msg, records ...dns.RR) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative, m.RecursionAvailable = true, true
	m.Answer = records
	return m
}

func heading(q dns.Question, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: q.Name, Rrtype: kind, Class: dns.ClassINET, Ttl: localTTL}
}

// forward asks the upstreams, the one that answered last first.
func (s *Server) forward(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	if len(s.c.Upstreams) == 0 {
		return nil, errors.New("no resolver is configured")
	}
	first := int(s.good.Load())
	var problems []error
	for i := range s.c.Upstreams {
		n := (first + i) % len(s.c.Upstreams)
		m, err := exchange(ctx, s.c.Upstreams[n], q)
		if err == nil && m.Rcode != dns.RcodeServerFailure && m.Rcode != dns.RcodeRefused {
			s.good.Store(int32(n))
			return m, nil
		}
		if err == nil {
			err = fmt.Errorf("%s answers %s", s.c.Upstreams[n], dns.RcodeToString[m.Rcode])
		}
		problems = append(problems, err)
	}
	return nil, errors.Join(problems...)
}

func exchange(ctx context.Context, upstream string, q *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	m, _, err := (&dns.Client{Net: "udp", UDPSize: dns.DefaultMsgSize}).ExchangeContext(ctx, q, upstream)
	if err == nil && m.Truncated {
		m, _, err = (&dns.Client{Net: "tcp"}).ExchangeContext(ctx, q, upstream)
	}
	return m, err
}

func (s *Server) lookup(key question, q *dns.Msg) *dns.Msg {
	s.mu.Lock()
	c, ok := s.cache[key]
	s.mu.Unlock()
	now := time.Now()
	if !ok || now.After(c.until) {
		return nil
	}
	m := c.answer.Copy()
	m.Id = q.Id
	m.Question = q.Question // in the case of letters that was asked
	age := uint32(now.Sub(c.at).Seconds())
	for _, part := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, r := range part {
			if r.Header().Rrtype != dns.TypeOPT {
				r.Header().Ttl -= min(age, r.Header().Ttl)
			}
		}
	}
	return m
}

// keep remembers an answer for as long as its shortest record lives.
func (s *Server) keep(key question, m *dns.Msg) {
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError || len(m.Answer)+len(m.Ns) == 0 {
		return
	}
	life := maxTTL
	for _, part := range [][]dns.RR{m.Answer, m.Ns} {
		for _, r := range part {
			life = min(life, time.Duration(r.Header().Ttl)*time.Second)
			if soa, ok := r.(*dns.SOA); ok {
				life = min(life, time.Duration(soa.Minttl)*time.Second) // RFC 2308
			}
		}
	}
	if life <= 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cache) >= maxCached {
		for k := range s.cache { // any one
			delete(s.cache, k)
			break
		}
	}
	now := time.Now()
	s.cache[key] = cached{answer: m.Copy(), at: now, until: now.Add(life)}
}

// SystemUpstreams reads the machine's resolvers. Those on loopback can't be
// reached from another network namespace: where systemd-resolved is in charge,
// its own list is read instead.
func SystemUpstreams(files ...string) ([]string, error) {
	if len(files) == 0 {
		files = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}
	}
	var problems []error
	for _, file := range files {
		servers, err := nameservers(file)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if len(servers) > 0 {
			return servers, nil
		}
		problems = append(problems, fmt.Errorf("%s names no resolver beyond this machine's loopback", file))
	}
	return nil, cmp.Or(errors.Join(problems...), errors.New("no resolver found"))
}

func nameservers(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var servers []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		ip, err := netip.ParseAddr(words[1])
		if err == nil && !ip.IsLoopback() && ip.Zone() == "" {
			servers = append(servers, netip.AddrPortFrom(ip, 53).String())
		}
	}
	return servers, nil
}
