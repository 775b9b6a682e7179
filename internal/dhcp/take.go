package dhcp

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
)

// NotTaken is a lease that Take left, and why.
type NotTaken struct {
	IP  netip.Addr
	MAC net.HardwareAddr
	Why error
}

// Take makes another server's leases and reservations (Reserved) this one's, and says
// which can't be: nobody who has a lease here loses it. All others are on disk when
// Take returns. What has ended is remembered, so that its client gets it again.
func (s *Server) Take(all []Lease) (left []NotTaken, err error) {
	var text []byte
	s.mu.Lock()
	if s.log == nil {
		s.mu.Unlock()
		return nil, errNotRunning
	}
	for _, l := range all {
		var entry []byte
		var err error
		if l.State == Reserved {
			entry, err = s.reserve(&Reservation{IP: l.IP, MAC: l.MAC, ClientID: l.ClientID, Name: l.Hostname, MicroVM: l.MicroVM})
		} else {
			entry, err = s.take(l)
		}
		if err != nil {
			left = append(left, NotTaken{l.IP, l.MAC, err})
		}
		text = append(text, entry...)
	}
	s.changed()
	wait := s.order(text, false)
	s.unlock()
	if err := wait(); err != nil {
		return nil, fmt.Errorf("take leases over: %w", err)
	}
	return left, nil
}

// take changes the table, and says what the log must.
func (s *Server) take(l Lease) (text []byte, err error) {
	ip := from(l.IP)
	m := &message{id: l.ClientID}
	p, old := s.pool(ip), s.leases[ip]
	switch {
	case len(l.MAC) != 6 || [6]byte(l.MAC) == [6]byte{}:
		return nil, fmt.Errorf("it names no card: %w", errdefs.ErrInvalidArgument)
	case p == nil || !p.keepable(ip):
		return nil, fmt.Errorf("it is not for clients in %s: %w", s.subnets(), errdefs.ErrInvalidArgument)
	}
	m.mac = [6]byte(l.MAC)
	ended := l.State != Active || l.Ends.Unix() <= s.seconds()
	had := s.byMAC[m.mac]
	switch {
	case !s.free(p, ip, m, false):
		return nil, fmt.Errorf("it is in no range, or another client has it or is kept it: %w", errdefs.ErrFailedPrecondition)
	case ended && (old != nil || had != nil):
		return nil, nil // what is known here is newer
	case had != nil && had != old && s.current(had) == stateActive && p.contains(had.ip):
		return nil, fmt.Errorf("the card has %s here: %w", had.ip, errdefs.ErrAlreadyExists)
	case old != nil && s.same(old, m) && s.current(old) == stateActive && old.ends >= l.Ends.Unix():
		return nil, nil // it was renewed here
	}
	p.drop(ip)
	r := s.give(ip, m, stateActive, l.Ends.Unix())
	r.starts = max(l.Starts.Unix(), 0)
	if ended {
		r.state, r.ends = stateReleased, min(max(l.Ends.Unix(), 1), s.seconds()-1)
		s.file(r)
	}
	if name := hostname([]byte(l.Hostname)); name != "" {
		s.unname(r)
		r.hostname = name
		s.claim(r)
	}
	r.logged = true
	return formatRecord(nil, r), nil
}
