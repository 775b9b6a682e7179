package dhcp

import (
	"bytes"
	"context"
	"net/netip"
	"time"
)

// Changes has a value whenever leases may have changed since it was last read.
func (s *Server) Changes() <-chan struct{} { return s.listen() }

func (s *Server) listen() chan struct{} {
	wake := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watches[wake] = true
	return wake
}

// changed tells those who watch that leases may have changed.
func (s *Server) changed() {
	for w := range s.watches {
		poke(w)
	}
}

const (
	// watchPause is the shortest time between two looks of a watch, and watchShare how
	// much longer than a look it is: of many leases, looking takes a while.
	watchPause = 50 * time.Millisecond
	watchShare = 20
)

// Watch calls see with each lease as it is, initial, then with each one that has
// changed, until ctx ends or see fails. It sees leases end, too. Of changes in quick
// succession it sees the last. An address that is kept for nobody any more, and was
// never given, is seen as released.
func (s *Server) Watch(ctx context.Context, see func(l Lease, initial bool) error) error {
	wake := s.listen()
	defer func() {
		s.mu.Lock()
		delete(s.watches, wake)
		s.mu.Unlock()
	}()
	var known map[netip.Addr]Lease
	for {
		began := time.Now()
		next, err := s.compare(&known, see)
		if err != nil {
			return err
		}
		if !sleep(ctx, max(watchPause, watchShare*time.Since(began))) {
			return ctx.Err()
		}
		timer := time.NewTimer(next)
		select {
		case <-wake:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// compare shows what is not as it was known, and says when the next lease ends.
func (s *Server) compare(known *map[netip.Addr]Lease, see func(l Lease, initial bool) error) (next time.Duration, err error) {
	before, now := *known, s.c.Now()
	initial := before == nil
	next = time.Hour
	all := s.Leases()
	is := make(map[netip.Addr]Lease, len(all))
	for _, l := range all {
		is[l.IP] = l
		if l.State == Active || l.State == Offered || l.State == Declined {
			next = min(next, max(l.Ends.Sub(now), 0))
		}
		was, there := before[l.IP]
		delete(before, l.IP)
		if there && was.equal(l) {
			continue
		}
		if err := see(l, initial); err != nil {
			return 0, err
		}
	}
	for _, l := range before {
		if l.State, l.Reserved = Released, false; err == nil {
			err = see(l, false)
		}
	}
	*known = is
	return next, err
}

func (l Lease) equal(x Lease) bool {
	return l.IP == x.IP && bytes.Equal(l.MAC, x.MAC) && bytes.Equal(l.ClientID, x.ClientID) && l.Hostname == x.Hostname && l.MicroVM == x.MicroVM &&
		l.Starts.Equal(x.Starts) && l.Ends.Equal(x.Ends) && l.State == x.State && l.Reserved == x.Reserved
}
