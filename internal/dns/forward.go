package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// upstreamTime is how long a question may take in all; the next upstream is asked,
	// beside the ones before it, when there is no answer for a while. After the last
	// one it is the first again, since packets get lost.
	upstreamTime = 4 * time.Second
	nextTime     = 500 * time.Millisecond
	mostTries    = 6

	maxTTL = time.Hour
)

// forward asks the upstreams, the one that answered last first.
func (s *Server) forward(ctx context.Context, q *question) (*dns.Msg, error) {
	all := s.c.Upstreams
	if len(all) == 0 {
		return nil, errors.New("no resolver is configured")
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	type result struct {
		upstream int
		m        *dns.Msg
		err      error
	}
	results := make(chan result, max(mostTries, len(all)))
	first, tried, under := int(s.good.Load()), 0, 0
	ask := func() {
		n := (first + tried) % len(all)
		tried, under = tried+1, under+1
		s.asking.Go(func() {
			m, err := exchange(ctx, all[n], q)
			results <- result{n, m, err}
		})
	}
	ask()
	next := time.NewTimer(nextTime)
	defer next.Stop()
	problems := make([]error, len(all)) // the last of each
	for {
		select {
		case r := <-results:
			under--
			if r.err == nil {
				s.good.Store(int32(r.upstream))
				return r.m, nil
			}
			problems[r.upstream] = r.err
			if tried < len(all) { // it said so at once
				ask()
			} else if under == 0 {
				return nil, errors.Join(problems...)
			}
		case <-next.C:
			if tried < mostTries {
				ask()
				next.Reset(nextTime)
			}
		}
	}
}

// exchange asks one upstream, over TCP if its answer does not fit. An upstream that could
// not find out is no better than none.
func exchange(ctx context.Context, upstream string, q *question) (*dns.Msg, error) {
	m, err := exchangeBy(ctx, "udp", upstream, q)
	if err == nil && m.Truncated {
		m, err = exchangeBy(ctx, "tcp", upstream, q)
	}
	if err == nil && m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		err = fmt.Errorf("%s answers %s", upstream, dns.RcodeToString[m.Rcode])
	}
	return m, err
}

func exchangeBy(ctx context.Context, network, upstream string, q *question) (*dns.Msg, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, upstream)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	id := dns.Id()
	stream := network == "tcp"
	if _, err := c.Write(q.upward(id, stream)); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	for {
		n := 0
		if stream {
			var length [2]byte
			if _, err = io.ReadFull(c, length[:]); err == nil {
				b = make([]byte, binary.BigEndian.Uint16(length[:]))
				n, err = io.ReadFull(c, b)
			}
		} else {
			n, err = c.Read(b)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s does not answer: %w", upstream, context.Cause(ctx))
		}
		if err != nil {
			return nil, err
		}
		m := new(dns.Msg)
		if err := m.Unpack(b[:n]); err == nil && m.Id == id && m.Response && q.matches(m) {
			return m, nil
		} else if stream {
			return nil, fmt.Errorf("%s answers something else", upstream)
		}
	}
}

// upward is a question as upstreams get it. The answer will be others', too: whoever asks
// must not know its id, nor add what it is to depend on.
func (q *question) upward(id uint16, stream bool) []byte {
	u := &question{message: q.message, key: q.key, end: q.end, edns: true, dnssec: q.dnssec}
	b := u.opt(u.head(nil, 0), 0, 0)
	copy(b[headerSize:], q.name())
	binary.BigEndian.PutUint16(b, id)
	binary.BigEndian.PutUint16(b[2:], flagRecursionDesired|flagAuthentic|q.flags&flagCheckingDisabled)
	if stream {
		b = append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
	}
	return b
}

// matches says whether an answer is to the question.
func (q *question) matches(m *dns.Msg) bool {
	if len(m.Question) != 1 || m.Question[0].Qtype != q.kind() || m.Question[0].Qclass != q.class() {
		return false
	}
	name := make([]byte, mostName+1)
	n, err := dns.PackDomainName(m.Question[0].Name, name, 0, nil, false)
	lower(name[:max(n, 0)])
	return err == nil && string(name[:n]) == string(q.name())
}

// packed makes an upstream's answer one of ours, and says how long it may be kept: as long
// as its shortest record.
func packed(q *question, m *dns.Msg) (*answer, time.Duration, error) {
	m.Extra = withoutOPT(m.Extra)
	life := maxTTL
	for _, part := range [][]dns.RR{m.Answer, m.Ns} {
		for _, r := range part {
			life = min(life, time.Duration(r.Header().Ttl)*time.Second)
			if soa, ok := r.(*dns.SOA); ok && len(m.Answer) == 0 || ok && m.Rcode == dns.RcodeNameError {
				life = min(life, time.Duration(soa.Minttl)*time.Second) // RFC 2308
			}
		}
	}
	if len(m.Answer)+len(m.Ns) == 0 {
		life = 0
	}
	m.Compress = true
	m.Question[0].Name = strings.ToLower(m.Question[0].Name)
	b, err := m.Pack()
	if err != nil {
		return nil, 0, fmt.Errorf("pack an answer: %w", err)
	}
	a := &answer{key: string(q.key), flags: uint16(m.Rcode), at: time.Now()}
	if m.AuthenticatedData {
		a.flags |= flagAuthentic
	}
	copy(a.count[:], b[6:])
	a.body = b[q.end:]
	a.ttls, err = ttls(a.body)
	return a, life, err
}

func withoutOPT(records []dns.RR) []dns.RR {
	var others []dns.RR
	for _, r := range records {
		if r.Header().Rrtype != dns.TypeOPT {
			others = append(others, r)
		}
	}
	return others
}

// ttls is where in a list of records their times to live are.
func ttls(body []byte) ([]uint16, error) {
	var all []uint16
	for at := 0; at < len(body); {
		name := skipName(body[at:])
		if name < 0 || at+name+10 > len(body) {
			return nil, errors.New("pack an answer: its records can't be read")
		}
		at += name
		all = append(all, uint16(at+4))
		at += 10 + int(binary.BigEndian.Uint16(body[at+8:]))
	}
	return all, nil
}
