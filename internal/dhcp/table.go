package dhcp

import (
	"container/heap"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

type state byte

const (
	stateActive state = iota
	stateOffered
	stateReleased
	stateExpired
	stateDeclined
)

func (s state) String() string {
	return [...]string{Active, Offered, Released, Expired, Declined}[s]
}

// nowhere is the place of a record that is not in its subnet's heap.
const nowhere = -1

// offerTime is how long an offered address waits for its request; declineTime is
// how long one that somebody else uses is left alone.
const (
	offerTime   = 60
	declineTime = 600
)

// record is a Lease in the table, where there may be many: times are seconds
// since 1970.
type record struct {
	starts, ends int64
	busy         int64 // until then only its card may have it: it was seen there
	id, hostname string
	ip           addr4
	place        int32 // in the heap
	mac          [6]byte
	state        state
	logged       bool // the log has an entry of the address
	unnamed      bool // when it was given, another lease had its host name
}

func (r *record) lease() Lease {
	return Lease{
		IP: r.ip.netip(), MAC: net.HardwareAddr(r.mac[:]), ClientID: []byte(r.id), Hostname: r.hostname,
		Starts: time.Unix(r.starts, 0).UTC(), Ends: time.Unix(r.ends, 0).UTC(), State: r.state.String(),
	}
}

func (s *Server) seconds() int64 { return s.c.Now().Unix() }

// current is a record's state now.
func (s *Server) current(r *record) state {
	if r.state != stateReleased && r.ends <= s.seconds() {
		return stateExpired
	}
	return r.state
}

// ended says that nobody has a right to the address any more.
func (s *Server) ended(r *record) bool {
	state := s.current(r)
	return state == stateExpired || state == stateReleased
}

// index makes a record the newest of its client and files it by its end.
func (s *Server) index(r *record) {
	if r.mac != [6]byte{} && r.state != stateDeclined {
		s.byMAC[r.mac] = r
		if r.id != "" {
			s.byID[r.id] = r
		}
	}
	s.file(r)
}

// file puts a record where its end belongs.
func (s *Server) file(r *record) {
	p := s.pool(r.ip)
	switch {
	case p == nil || !p.dynamic(r.ip):
	case r.place == nowhere:
		heap.Push(&p.ended, r)
	default:
		heap.Fix(&p.ended, int(r.place))
	}
}

// claim makes an active lease the one that its host name means. Who has a name
// keeps it for as long as the lease: a client can't take another's by saying so.
func (s *Server) claim(r *record) {
	r.unnamed = false
	name := strings.ToLower(r.hostname)
	if r.state != stateActive || !isLabel(name) {
		return
	}
	if old := s.named[name]; old != nil && old.mac != r.mac && s.current(old) == stateActive {
		r.unnamed = true
		return
	}
	s.named[name] = r
}

// unname forgets that a lease had its host name.
func (s *Server) unname(r *record) {
	if name := strings.ToLower(r.hostname); s.named[name] == r {
		delete(s.named, name)
	}
}

// Lookup is the address of the active lease that has a host name.
func (s *Server) Lookup(name string) (ip netip.Addr, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.named[strings.ToLower(name)]
	if r == nil || s.current(r) != stateActive {
		return ip, false
	}
	return r.ip.netip(), true
}

// AddressOf is the address that a card has: that of its active lease.
func (s *Server) AddressOf(mac net.HardwareAddr) (ip netip.Addr, ok bool) {
	if len(mac) != 6 {
		return ip, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.byMAC[[6]byte(mac)]
	if r == nil || s.current(r) != stateActive {
		return ip, false
	}
	return r.ip.netip(), true
}

// CardOf is the card that has an address, by an active lease.
func (s *Server) CardOf(ip netip.Addr) (mac net.HardwareAddr, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.leases[from(ip)]
	if r == nil || s.current(r) != stateActive {
		return nil, false
	}
	return slices.Clone(r.mac[:]), true
}

// NameOf is the host name that the active lease of an address has.
func (s *Server) NameOf(ip netip.Addr) (name string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.leases[from(ip)]
	if r == nil || s.current(r) != stateActive || s.named[strings.ToLower(r.hostname)] != r {
		return "", false
	}
	return r.hostname, true
}

// unindex forgets whose a record was.
func (s *Server) unindex(r *record) {
	s.unname(r)
	if s.byMAC[r.mac] == r {
		delete(s.byMAC, r.mac)
	}
	if s.byID[r.id] == r {
		delete(s.byID, r.id)
	}
}

// give makes an address the client's, in a state, until an end.
func (s *Server) give(ip addr4, m *message, st state, ends int64) *record {
	r := s.leases[ip]
	if r == nil {
		r = &record{ip: ip, place: nowhere}
		s.leases[ip] = r
	} else if r.mac != m.mac || r.id != string(m.id) {
		s.unindex(r)
		if r.mac != m.mac {
			r.hostname = ""
		}
		r.id = ""
	}
	if r.id == "" && len(m.id) > 0 {
		r.id = string(m.id)
	}
	if name := hostname(m.hostname); name != "" && name != r.hostname {
		s.unname(r)
		r.hostname = name
	}
	r.mac, r.state, r.starts, r.ends, r.busy = m.mac, st, s.seconds(), ends, 0
	s.index(r)
	s.claim(r)
	return r
}

// forget takes back an offer that nobody wants.
func (s *Server) forget(r *record) {
	s.unindex(r)
	r.state, r.ends = stateReleased, 0
	s.file(r)
}

// release ends a lease. Its client gets the same address if it comes back.
func (s *Server) release(r *record) {
	s.count.Releases++
	s.end(r)
}

// end has nobody have a right to a record's address any more.
func (s *Server) end(r *record) {
	// A second ago: scripts that compare by the second must not see it.
	r.state, r.ends = stateReleased, s.seconds()-1
	s.file(r)
}

// same says whether a record is of the client that sent m; or of the microVM for which
// an address is to be reserved.
func (s *Server) same(r *record, m *message) bool {
	if m.mac == [6]byte{} && m.vm != "" {
		return s.microVM(r.mac) == m.vm
	}
	return r.mac == m.mac && r.mac != [6]byte{}
}

// microVM is the one that has a card; empty: none.
func (s *Server) microVM(mac [6]byte) string {
	if s.c.MicroVM == nil || mac == [6]byte{} {
		return ""
	}
	return s.c.MicroVM(mac[:])
}

// had is the client's newest record in a subnet.
func (s *Server) had(p *pool, m *message) *record {
	r := s.byMAC[m.mac]
	if len(m.id) > 0 && r == nil {
		// A client that comes back with a new card, or a copy of a machine that lives.
		if r = s.byID[string(m.id)]; r != nil && !s.ended(r) {
			return nil
		}
	}
	if r == nil || !p.contains(r.ip) {
		return nil
	}
	return r
}

// kept is the client's reservation in a subnet.
func (s *Server) kept(p *pool, m *message) *Reservation {
	if len(s.booked.byIP) == 0 {
		return nil
	}
	return s.booked.of(p, m, s.name(m))
}

// name is what the client calls itself, if that matters.
func (s *Server) name(m *message) string {
	if len(s.booked.byName) == 0 {
		return ""
	}
	return hostname(m.hostname)
}

// free says whether an address may be given to a client; reserve, whether it
// may be reserved for it.
func (s *Server) free(p *pool, ip addr4, m *message, reserve bool) bool {
	if len(s.booked.byIP) > 0 {
		if b := s.booked.byIP[ip]; b != nil {
			if s.booked.of(p, m, s.name(m)) != b {
				return false
			}
			reserve = true
		}
	}
	if !reserve && !p.dynamic(ip) || !p.keepable(ip) {
		return false
	}
	r := s.leases[ip]
	its := r != nil && s.same(r, m)
	if !reserve && !(its && !s.ended(r)) && s.c.Taken != nil && s.c.Taken(ip.netip(), m.mac[:]) {
		return false
	}
	switch {
	case r == nil || its:
		return true
	case r.busy > s.seconds():
		return false
	}
	return s.ended(r)
}

// choose finds the address for a client: its reservation, the one that it has or
// had, the one that it asks for, one that was probed or is being, one that nobody
// had, the one longest unused.
func (s *Server) choose(p *pool, m *message) (addr4, bool) {
	if b := s.kept(p, m); b != nil && s.free(p, from(b.IP), m, false) {
		return from(b.IP), true
	}
	if r := s.had(p, m); r != nil && s.free(p, r.ip, m, false) {
		return r.ip, true
	}
	if m.requested != 0 && p.contains(m.requested) && s.free(p, m.requested, m, false) {
		return m.requested, true
	}
	for len(p.ready) > 0 {
		ip := p.ready[0].ip
		p.ready = p.ready[1:]
		if s.free(p, ip, m, false) {
			return ip, true
		}
		if r := s.leases[ip]; r != nil {
			s.file(r)
		}
	}
	// ARP has not answered yet for these, nor been asked for the next.
	for i, ip := range p.probing {
		if s.free(p, ip, m, false) {
			p.probing = slices.Delete(p.probing, i, i+1)
			return ip, true
		}
	}
	for {
		ip, ok := p.unused(s.leases)
		if !ok {
			break
		}
		if s.free(p, ip, m, false) {
			return ip, true
		}
	}
	if r := s.oldest(p, m); r != nil {
		return r.ip, true
	}
	return 0, false
}

// oldest is the record that ended longest ago and that the client may have.
func (s *Server) oldest(p *pool, m *message) *record {
	now := s.seconds()
	var passed []*record // kept for others, or in use after their end
	defer func() {
		for _, r := range passed {
			s.file(r)
		}
	}()
	for len(p.ended) > 0 && p.ended[0].ends <= now {
		r := p.ended[0]
		if s.free(p, r.ip, m, false) {
			return r
		}
		passed = append(passed, heap.Pop(&p.ended).(*record))
	}
	return nil
}

// hostname is option 12, if it can stand for a host (RFC 1123, section 2.1).
// Whatever else a client calls itself is not for logs and scripts.
func hostname(b []byte) string {
	name := strings.TrimRight(string(b), "\x00")
	for label := range strings.SplitSeq(name, ".") {
		if !isLabel(label) {
			return ""
		}
	}
	return name
}

// isLabel says whether a name is one label of a host's: letters, digits, and
// hyphens inside.
func isLabel(s string) bool {
	for i := range len(s) {
		c := s[i]
		inside := i > 0 && i < len(s)-1
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' && inside) {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 63
}
