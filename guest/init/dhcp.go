package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// dhcpClient gets and keeps one interface's lease (RFC 2131). The server knows
// it by its MAC: it sends no client identifier.
type dhcpClient struct {
	card     iface
	hostname string
	bound    func(lease) // called with each new or renewed lease
	lost     func()      // called when a lease has ended
}

// Retransmission starts faster than RFC 2131 asks for: a lost first packet
// would cost a guest more than its whole boot.
const (
	firstWait = 500 * time.Millisecond
	lastWait  = 16 * time.Second
)

// errNak is a server's refusal: start again.
var errNak = errors.New("refused by the server")

// run keeps the lease until ctx ends.
func (c *dhcpClient) run(ctx context.Context) error {
	for ctx.Err() == nil {
		l, err := c.acquire(ctx)
		if err != nil {
			return ignoreEnd(ctx, fmt.Errorf("ask for an address on %s: %w", c.card.name, err))
		}
		c.bound(l)
		say("%s has %s", c.card.name, l.address)
		if err := c.keep(ctx, l); err != nil {
			return ignoreEnd(ctx, fmt.Errorf("keep the address of %s: %w", c.card.name, err))
		}
		if ctx.Err() == nil {
			c.lost()
		}
	}
	return nil
}

func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// acquire asks until there is a lease.
func (c *dhcpClient) acquire(ctx context.Context) (lease, error) {
	s, err := openPacket(c.card)
	if err != nil {
		return lease{}, err
	}
	defer s.close()
	defer context.AfterFunc(ctx, s.interrupt)()
	for {
		m := message{kind: discover, xid: rand.Uint32(), mac: c.card.mac, hostname: c.hostname}
		offer, err := c.exchange(ctx, s, m, discoverOffer, 0)
		if err != nil {
			return lease{}, err
		}
		m.kind, m.requested, m.server = request, offer.address.Addr(), offer.server
		// A server that offers but does not answer is asked for five seconds.
		l, err := c.exchange(ctx, s, m, requestAck, 5*time.Second)
		switch {
		case err == nil:
			return l, nil
		case !errors.Is(err, errNak) && !errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil:
			return lease{}, err
		}
		if err := pause(ctx, firstWait); err != nil { // a server that always refuses is not hammered
			return lease{}, err
		}
	}
}

// keep renews the lease for as long as a server lets it: from half of its time
// by asking its own server, from seven eighths by asking any. It returns nil
// when the lease has ended.
func (c *dhcpClient) keep(ctx context.Context, l lease) error {
	for l.time > 0 {
		end := l.start.Add(l.time)
		if err := pause(ctx, time.Until(l.start.Add(l.renew))); err != nil {
			return err
		}
		renewed, err := c.renewBefore(ctx, l, l.start.Add(l.rebind), openUnicast)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			renewed, err = c.renewBefore(ctx, l, end, func(card iface, _ lease) (*packetSocket, error) { return openPacket(card) })
		}
		switch {
		case err == nil:
			c.bound(renewed)
			l = renewed
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errNak) || errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		default:
			return err
		}
	}
	<-ctx.Done() // a lease for ever
	return nil
}

func (c *dhcpClient) renewBefore(ctx context.Context, l lease, end time.Time, open func(iface, lease) (*packetSocket, error)) (lease, error) {
	left := time.Until(end)
	if left <= 0 {
		return lease{}, os.ErrDeadlineExceeded
	}
	s, err := open(c.card, l)
	if err != nil {
		return lease{}, err
	}
	defer s.close()
	defer context.AfterFunc(ctx, s.interrupt)()
	m := message{kind: request, xid: rand.Uint32(), mac: c.card.mac, hostname: c.hostname, current: l.address.Addr()}
	return c.exchange(ctx, s, m, requestAck, left)
}

// answers are the kinds of message that end an exchange.
type answers int

const (
	discoverOffer answers = iota
	requestAck
)

// exchange sends m, again and again, until it is answered or limit has passed (0: never).
func (c *dhcpClient) exchange(ctx context.Context, s *packetSocket, m message, want answers, limit time.Duration) (lease, error) {
	start := time.Now()
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		if err := s.send(m.marshal()); err != nil && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ECONNREFUSED) {
			return lease{}, err
		}
		sent := time.Now()
		// Many guests that start at once do not ask at once again.
		until := sent.Add(wait + rand.N(wait/4))
		if limit > 0 && until.After(start.Add(limit)) {
			until = start.Add(limit)
		}
		for {
			b, err := s.receive(ctx, until)
			if ctx.Err() != nil {
				return lease{}, ctx.Err()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ECONNREFUSED) {
				continue
			}
			if err != nil {
				return lease{}, err
			}
			l, kind, ok := parseReply(b, m)
			switch {
			case !ok:
			case want == discoverOffer && kind == offer, want == requestAck && kind == ack:
				l.start = sent
				return l, nil
			case want == requestAck && kind == nak:
				return lease{}, errNak
			}
		}
		if limit > 0 && !time.Now().Before(start.Add(limit)) {
			return lease{}, os.ErrDeadlineExceeded
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lease is what a server gave.
type lease struct {
	address             netip.Prefix
	server, router      netip.Addr
	dns                 []netip.Addr
	domain              string
	mtu                 int
	routes              []route // router's too, if there are no others
	start               time.Time
	time, renew, rebind time.Duration // 0: for ever
}
