package dhcp

import (
	"encoding/binary"
	"fmt"
	"maps"
	"time"
)

// reply is an answer and where it goes.
type reply struct {
	b     []byte // empty: none
	to    addr4
	mac   [6]byte
	relay bool // to a relay's port
	route bool // the kernel finds the way
	asked time.Time
}

// change is what a message did to the table, and must be on disk before its
// reply leaves.
type change struct {
	record  *record // nil: nothing
	left    *record // the client's lease before it, if that was of another address
	renewed bool    // the log has an older entry
	urgent  bool    // which scripts must not see any more
}

// handle changes the table, writes the reply, and appends to text what the log
// must say, which it orders to be written if the server runs.
func (s *Server) handle(m *message, out *reply, text []byte) (change, []byte) {
	s.mu.Lock()
	defer s.unlock()
	out.b = out.b[:0]
	c := s.decide(m, out)
	s.changed()
	if c.record != nil {
		if c.left != nil {
			text = formatRecord(text, c.left)
		}
		text = formatRecord(text, c.record)
		c.record.logged = true
		if s.log != nil {
			s.log.put(text, out, c)
		}
	}
	return c, text
}

func (s *Server) decide(m *message, out *reply) (c change) {
	if int(m.kind) < len(s.count.Received) {
		s.count.Received[m.kind]++
	} else {
		s.count.Received[0]++
	}
	p := s.subnet(m)
	if p == nil {
		s.note(s.c.Log.Warn, "no subnet is served there", "mac", m.card(), "relay", m.giaddr)
		return c
	}
	m.vm = ""
	if len(s.booked.byVM) > 0 {
		m.vm = s.microVM(m.mac)
	}
	switch m.kind {
	case kindDiscover:
		s.discover(p, m, out)
	case kindRequest:
		return s.request(p, m, out)
	case kindRelease:
		r := s.leases[m.client]
		if r == nil || !s.forUs(m) || !s.same(r, m) || s.current(r) != stateActive {
			return c
		}
		s.release(r)
		return change{record: r, renewed: true, urgent: true}
	case kindDecline:
		return s.decline(m)
	case kindInform:
		if p.contains(m.client) {
			s.count.Informs++
			s.write(p, m, out, kindAck, 0, 0)
		}
	}
	return c
}

// subnet is where the client is: where its relay says, where the address is
// that it renews, or our own segment.
func (s *Server) subnet(m *message) *pool {
	for _, ip := range []addr4{m.link, m.giaddr} {
		if ip != 0 {
			return s.pool(ip)
		}
	}
	if m.client != 0 {
		if p := s.pool(m.client); p != nil {
			return p
		}
	}
	return s.pool(s.own)
}

// forUs says whether a message that names a server names this one.
func (s *Server) forUs(m *message) bool {
	return m.server == 0 || m.server == s.own || m.override != 0 && m.server == m.override
}

// card is the client's MAC, for logs.
func (m *message) card() string { return macString(m.mac) }

func macString(mac [6]byte) string { return string(appendMAC(nil, mac)) }

func (s *Server) discover(p *pool, m *message, out *reply) {
	ip, ok := s.choose(p, m)
	if !ok {
		s.count.Exhausted++
		s.last.exhausted = s.c.Now()
		s.note(s.c.Log.Error, "no free address is left", "subnet", p.prefix, "mac", m.card(), "size", p.size())
		return
	}
	if r := s.leases[ip]; r == nil || s.current(r) != stateActive || !s.same(r, m) {
		s.give(ip, m, stateOffered, s.seconds()+offerTime)
	}
	s.count.Offers++
	s.write(p, m, out, kindOffer, ip, p.lifetime(m))
	p.wake()
}

// request answers the four kinds of REQUEST of RFC 2131, section 4.3.2.
func (s *Server) request(p *pool, m *message, out *reply) (c change) {
	if !s.forUs(m) {
		// The client took another server's offer: ours is free again.
		if r := s.had(p, m); r != nil && r.state == stateOffered {
			s.forget(r)
		}
		return c
	}
	ip := m.requested // selecting, init-reboot
	if ip == 0 {
		ip = m.client // renewing, rebinding
	}
	kept := s.kept(p, m)
	if kept != nil && from(kept.IP) != ip && !s.free(p, from(kept.IP), m, false) {
		kept = nil // somebody still has it
	}
	if ip == 0 || kept != nil && from(kept.IP) != ip || !s.free(p, ip, m, false) {
		s.refuse(p, m, ip, out)
		return c
	}
	life := p.lifetime(m)
	old, before := s.leases[ip], s.had(p, m)
	c.renewed = old != nil && old.logged
	c.record = s.give(ip, m, stateActive, s.seconds()+int64(life))
	// A client has one address of a subnet, or one would have all of them.
	if before != nil && before.ip != ip && !s.ended(before) {
		if before.logged {
			s.end(before)
			c.left, c.renewed, c.urgent = before, true, true
		} else { // an offer
			s.forget(before)
		}
	}
	s.count.Acks++
	s.write(p, m, out, kindAck, ip, life)
	return c
}

// refuse sends a NAK, if it is ours to say that the client is wrong: it asked
// us, we serve the segment alone, or we know that it has another address.
func (s *Server) refuse(p *pool, m *message, ip addr4, out *reply) {
	if m.server == 0 && !s.c.Authoritative && s.had(p, m) == nil {
		return
	}
	s.count.Naks++
	s.note(s.c.Log.Info, "refused", "mac", m.card(), "ip", ip)
	s.write(p, m, out, kindNak, 0, 0)
}

func (s *Server) decline(m *message) (c change) {
	r := s.leases[m.requested]
	if r == nil || !s.forUs(m) || !s.same(r, m) || s.ended(r) {
		return c
	}
	s.count.Declines++
	if !s.believes(m.mac) {
		s.note(s.c.Log.Warn, "a client finds too many addresses taken: it is not believed", "mac", m.card(), "ip", m.requested)
		s.end(r)
	} else {
		s.note(s.c.Log.Warn, "a client found its address taken", "mac", m.card(), "ip", m.requested)
		s.putAside(r, [6]byte{})
	}
	return change{record: r, renewed: true, urgent: true}
}

// decliner is what one card has declined.
type decliner struct {
	count int
	until int64 // when it is believed again
}

const (
	// believed is how many addresses one card may have put aside in the time that they are:
	// else a card that declines each would have them all.
	believed = 4
	// maxDecliners keeps who makes cards up from filling the memory.
	maxDecliners = 1024
)

// believes counts a card's declining, and says whether it is still believed.
func (s *Server) believes(mac [6]byte) bool {
	now := s.seconds()
	if len(s.decliners) >= maxDecliners {
		maps.DeleteFunc(s.decliners, func(_ [6]byte, d decliner) bool { return d.until <= now })
	}
	d := s.decliners[mac]
	if d.until <= now {
		d = decliner{until: now + declineTime}
	}
	if d.count >= believed || d.count == 0 && len(s.decliners) >= maxDecliners {
		return false
	}
	d.count++
	s.decliners[mac] = d
	return true
}

// putAside leaves an address alone for a while: somebody else uses it.
func (s *Server) putAside(r *record, user [6]byte) {
	s.unindex(r)
	r.mac, r.id, r.hostname = user, "", ""
	r.state, r.starts, r.ends = stateDeclined, s.seconds(), s.seconds()+declineTime
	s.file(r)
}

// lifetime is what the client asks for, within the subnet's limits.
func (p *pool) lifetime(m *message) uint32 {
	if m.lease == 0 {
		return p.initial
	}
	return min(max(m.lease, p.shortest), p.longest)
}

// write makes the reply to m.
func (s *Server) write(p *pool, m *message, out *reply, k kind, ip addr4, life uint32) {
	server := s.own
	if m.override != 0 {
		server = m.override
	}
	a := newAnswer(out.b, m, k, ip, server)
	if life > 0 {
		a.number(optionLeaseTime, life)
		a.number(optionRenew, life/2)
		a.number(optionRebind, uint32(uint64(life)*7/8))
	}
	if len(m.id) > 0 {
		a.option(optionClientID, m.id) // RFC 6842
	}
	if k != kindNak {
		s.options(p, m, &a)
	}
	out.b = a.bytes()
	out.address(p, m, k, ip)
}

// options adds what the client asks for, in its order, then the rest.
func (s *Server) options(p *pool, m *message, a *answer) {
	var mask [4]byte
	binary.BigEndian.PutUint32(mask[:], ^uint32(p.last-p.first))
	a.option(optionMask, mask[:])
	var sent [256]bool
	for _, code := range m.parameters {
		for _, o := range p.options {
			if o.code == code && !sent[code] {
				a.option(code, o.value)
				sent[code] = true
			}
		}
	}
	for _, o := range p.options {
		if !sent[o.code] {
			a.option(o.code, o.value)
		}
	}
}

// address sends the reply where RFC 2131, section 4.1, has it.
func (out *reply) address(p *pool, m *message, k kind, ip addr4) {
	out.relay, out.route = m.giaddr != 0, false
	switch {
	case m.giaddr != 0:
		out.to, out.route = m.giaddr, true
	case k == kindNak:
		out.to, out.mac = broadcast4, broadcastMAC
	case m.client != 0:
		out.to, out.mac, out.route = m.client, m.mac, !p.local
	case m.flags&flagBroadcast != 0:
		out.to, out.mac = broadcast4, broadcastMAC
	default:
		out.to, out.mac = ip, m.mac
	}
}

const broadcast4 addr4 = 0xffffffff

var broadcastMAC = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// quiet keeps a client that repeats itself from filling the log: each message
// is logged once a minute, with how often it happened meanwhile.
type quiet map[string]*struct {
	next   time.Time
	missed int
}

const quietTime = time.Minute

// note logs a message, but not each time; and not before the table is unlocked,
// since a log may make its writer wait.
func (s *Server) note(log func(string, ...any), message string, args ...any) {
	if s.quiet == nil {
		s.quiet = quiet{}
	}
	q := s.quiet[message]
	if q == nil {
		q = &struct {
			next   time.Time
			missed int
		}{}
		s.quiet[message] = q
	}
	now := s.c.Now()
	if now.Before(q.next) {
		q.missed++
		return
	}
	if q.missed > 0 {
		args = append(args, "repeated", fmt.Sprintf("%d times", q.missed))
	}
	q.next, q.missed = now.Add(quietTime), 0
	s.notes = append(s.notes, func() { log(message, args...) })
}

// unlock ends what needed the table, and logs what came of it.
func (s *Server) unlock() {
	notes := s.notes
	s.notes = nil
	s.mu.Unlock()
	for _, log := range notes {
		log()
	}
}
