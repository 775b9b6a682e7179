package dhcp

import (
	"errors"
	"fmt"
)

// Import takes leases and reservations of another server, as ReadLeases and
// ReadConf read them, and says how many. What is not free here, or not to be
// given, is not taken and stands in the error. All is on disk when it returns.
func (s *Server) Import(leases []Lease, reservations []Reservation) (taken int, err error) {
	var refused []error
	var text []byte
	s.mu.Lock()
	for _, r := range reservations {
		if err := s.reserve(&r); err != nil {
			refused = append(refused, fmt.Errorf("reserve %s for %s: %w", r.IP, r.client(), err))
			continue
		}
		text = formatReservation(text, r)
		taken++
	}
	for _, l := range leases {
		if l.State != Active || len(l.MAC) != 6 || !s.c.Now().Before(l.Ends) {
			continue // its client has no right to it any more
		}
		if !s.adoptLease(l) {
			refused = append(refused, fmt.Errorf("lease %s to %s: it is not free, or not to be given", l.IP, l.MAC))
			continue
		}
		r := s.leases[from(l.IP)]
		r.logged = true
		text = formatRecord(text, r)
		taken++
	}
	s.mu.Unlock()
	if taken > 0 {
		refused = append(refused, s.record(text))
	}
	return taken, errors.Join(refused...)
}

// adoptLease makes another server's lease ours, if the address is free.
func (s *Server) adoptLease(l Lease) bool {
	m := &message{mac: [6]byte(l.MAC), id: l.ClientID, hostname: []byte(l.Hostname)}
	p := s.pool(from(l.IP))
	if p == nil || !s.free(p, from(l.IP), m, false) {
		return false
	}
	r := s.give(from(l.IP), m, stateActive, l.Ends.Unix())
	r.starts = l.Starts.Unix()
	return true
}
