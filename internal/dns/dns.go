// Package dns answers the names of an environment's machines and microVMs, and forwards
// all other questions to resolvers, with a cache. It serves only the prefixes that it is
// told to: it is never an open resolver. It signs and validates nothing.
//
// What is in the cache is answered from the packed message, without an allocation, by
// sockets that take and give many messages in one system call.
package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

// Config says what a server answers.
type Config struct {
	Listen    []netip.AddrPort
	Allow     []netip.Prefix // who may ask
	Upstreams []string       // host:port; the one that has answered last is asked first
	Domain    string         // of the environment's names: lab.internal
	Server    string         // this server's own name in it
	Reverse   []netip.Prefix // addresses that only NameOf has names for
	Log       *slog.Logger

	// Lookup is the address of a name in the domain, in lower case and without the
	// domain, or the zero value if the name is there and has none. NameOf is the name
	// of an address in Reverse. They are asked each time, and must not block.
	Lookup func(name string) (netip.Addr, bool)
	NameOf func(netip.Addr) (string, bool)
}

const (
	// Beside it are the hub's other services: guests must not use up its
	// descriptors. Each forwarded question and each TCP connection has one.
	maxForwarded, maxForwardedEach = 256, 16
	maxStreams, maxStreamsEach     = 128, 8

	quietTime  = time.Minute
	streamTime = 10 * time.Second // of a TCP connection without a question
)

// Server is a DNS server. New only allocates.
type Server struct {
	c       Config
	zone    zone
	ready   chan struct{}
	serving atomic.Bool
	good    atomic.Int32 // the upstream that answered last

	cache     *cache
	forwarded *run.Quota
	flight    singleflight.Group // of questions that are the same
	asking    sync.WaitGroup     // questions that are being forwarded
	count     counts

	mu     sync.Mutex // guards all below
	failed int        // questions that no line in the log tells of
	quiet  time.Time  // until then there is none
}

// New prepares a server.
func New(c Config) *Server {
	return &Server{
		c: c, zone: newZone(c), ready: make(chan struct{}), cache: newCache(),
		forwarded: run.NewQuota(maxForwarded, maxForwardedEach),
	}
}

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "dns" }

// Facts are the server's state.
type Facts struct {
	Serving   bool
	Listen    []netip.AddrPort
	Upstreams []string
	Answers   Answers
}

// Answers count since the server began, by where they came from. Together they are the
// questions.
type Answers struct {
	Own       uint64 // names and addresses of the environment
	Cached    uint64
	Forwarded uint64 // to an upstream, or to one with others that asked the same
	Failed    uint64 // no upstream had an answer, or the question was none
	Refused   uint64 // who asks is not of the environment
}

// counts are Answers that are being counted.
type counts struct{ own, cached, forwarded, failed, refused atomic.Uint64 }

func (c *counts) read() Answers {
	return Answers{c.own.Load(), c.cached.Load(), c.forwarded.Load(), c.failed.Load(), c.refused.Load()}
}

// Facts says how the server is.
func (s *Server) Facts() Facts {
	return Facts{Serving: s.serving.Load(), Listen: s.c.Listen, Upstreams: s.c.Upstreams, Answers: s.count.read()}
}

// Run serves over UDP and TCP until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	defer s.asking.Wait()
	streams := run.NewQuota(maxStreams, maxStreamsEach)
	var begin []func() error
	for _, at := range s.c.Listen {
		// TCP first: no other server can have that port, while UDP sockets share one.
		stream, err := run.Listen(ctx, net.ListenConfig{}, "tcp", at.String())
		if err != nil {
			return fmt.Errorf("serve DNS: %w", err)
		}
		defer stream.Close()
		begin = append(begin, func() error { return s.streams(ctx, run.Limit(stream, streams)) })
		for range max(1, runtime.GOMAXPROCS(0)/2) { // the kernel's part of the work is as much
			conn, err := listenPacket(ctx, at)
			if err != nil {
				return fmt.Errorf("serve DNS: %w", err)
			}
			defer conn.Close()
			begin = append(begin, func() error { return s.packets(ctx, conn) })
		}
	}
	for _, f := range begin {
		group.Go(f)
	}
	s.serving.Store(true)
	defer s.serving.Store(false)
	close(s.ready)
	return group.Wait()
}

// listenPacket opens one of several UDP sockets that share a port: the kernel parts the
// clients among them.
func listenPacket(ctx context.Context, at netip.AddrPort) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var control error
		err := c.Control(func(fd uintptr) {
			control = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), receiveBuffer(int(fd)))
		})
		return errors.Join(err, control)
	}}
	var p net.PacketConn
	err := run.Patiently(ctx, unix.EADDRINUSE, func() (err error) {
		p, err = lc.ListenPacket(ctx, "udp", at.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return p.(*net.UDPConn), nil
}

// receiveBuffer keeps what comes while the server is busy. Root may have more of it than
// net.core.rmem_max.
func receiveBuffer(fd int) error {
	const size = 1 << 20
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size)
}

// packets answers what comes by a UDP socket until ctx ends.
func (s *Server) packets(ctx context.Context, conn *net.UDPConn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	b, err := newBatch(conn)
	if err != nil {
		return err
	}
	var q question
	for {
		n, err := b.receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive DNS questions: %w", err)
		}
		now := time.Now()
		for i := range n {
			message, from := b.message(i)
			if !q.read(message) {
				continue // nothing that could be answered
			}
			q.from, q.limit = from, q.size
			answer, ok := s.quick(&q, b.reply(i), now)
			if !ok {
				later := q.clone()
				s.asking.Go(func() {
					if _, err := conn.WriteToUDPAddrPort(s.slow(ctx, later), later.from); err != nil && ctx.Err() == nil {
						s.c.Log.Debug("send DNS answer", "err", err)
					}
				})
			}
			b.answer(i, answer)
		}
		if err := b.send(n); err != nil && ctx.Err() == nil {
			s.c.Log.Debug("send DNS answers", "err", err)
		}
	}
}

// streams answers what comes by TCP until ctx ends.
func (s *Server) streams(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept DNS connections: %w", err)
		}
		open.Go(func() { s.stream(ctx, c) })
	}
}

// stream answers one connection: messages with their lengths before them.
func (s *Server) stream(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	from, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return
	}
	var q question
	var length [2]byte
	for message := make([]byte, usualMessage); ; {
		c.SetDeadline(time.Now().Add(streamTime))
		if _, err := io.ReadFull(c, length[:]); err != nil {
			return
		}
		message = slices.Grow(message[:0], int(binary.BigEndian.Uint16(length[:])))[:binary.BigEndian.Uint16(length[:])]
		if _, err := io.ReadFull(c, message); err != nil || !q.read(message) {
			return
		}
		q.from, q.limit = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), maxMessage
		answer, ok := s.quick(&q, make([]byte, 0, usualMessage), time.Now())
		if !ok {
			answer = s.slow(ctx, q.clone()) // upstreams that are not waited for any more still read it
		}
		c.SetDeadline(time.Now().Add(streamTime))
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// quick appends the answer of a question to b, if it is known without asking anybody.
func (s *Server) quick(q *question, b []byte, now time.Time) (answer []byte, ok bool) {
	if !slices.ContainsFunc(s.c.Allow, func(p netip.Prefix) bool { return p.Contains(q.from.Addr()) }) {
		s.count.refused.Add(1)
		return q.fail(b, refused), true
	}
	if q.mistake != success {
		s.count.failed.Add(1)
		return q.fail(b, q.mistake), true
	}
	if a := s.cache.get(q, now); a != nil {
		s.count.cached.Add(1)
		return q.answer(b, a, now), true
	}
	if a, ok := s.zone.answer(q); ok {
		s.count.own.Add(1)
		return q.answer(b, &a, now), true
	}
	return nil, false
}

// slow answers what others have to be asked.
func (s *Server) slow(ctx context.Context, q *question) []byte {
	give, ok := s.forwarded.Take(net.UDPAddrFromAddrPort(q.from))
	if !ok {
		s.count.failed.Add(1)
		s.warn("too many DNS questions at one time", "from", q.from.Addr())
		return q.fail(nil, serverFailure)
	}
	defer give()
	found, err, _ := s.flight.Do(string(q.key), func() (any, error) {
		m, err := s.forward(ctx, q)
		if err != nil {
			return nil, err
		}
		a, life, err := packed(q, m)
		if err == nil && life > 0 && !q.isShort() {
			a.until = a.at.Add(life)
			s.cache.put(a)
		}
		return a, err
	})
	if err != nil {
		s.count.failed.Add(1)
		if ctx.Err() == nil {
			s.warn("forward DNS question", "name", q.text(), "err", err)
		}
		return q.fail(nil, serverFailure)
	}
	s.count.forwarded.Add(1)
	return q.answer(nil, found.(*answer), time.Now())
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
