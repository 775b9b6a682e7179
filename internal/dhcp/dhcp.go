// Package dhcp is a DHCPv4 server (RFC 2131, RFC 2132) for one interface, and its
// lease log. No acknowledgement leaves before its lease is on disk; leases that
// are acknowledged together share one write. It decides addresses by the card's
// MAC and not by the client identifier, because copies of one disk image share
// the latter. It answers no relays yet, and does not speak DHCPv6.
package dhcp

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Config says what a server gives away.
type Config struct {
	Interface   string
	Server      netip.Addr // our own address on Interface
	Subnet      netip.Prefix
	First, Last netip.Addr   // the range
	Exclude     []netip.Addr // addresses in the range that are never given
	Router      netip.Addr
	DNS         []netip.Addr
	Domain      string

	DefaultLease, MaxLease, MinLease time.Duration // 0: 10 min, 2 h, 1 min

	LeaseFile    string // in the form of ISC's dhcpd.leases
	ConfigFile   string // an export for people and scripts: dhcpd.conf
	DefaultsFile string // likewise: /etc/default/isc-dhcp-server

	Log *slog.Logger
	Now func() time.Time // nil: time.Now
}

// The states of a lease.
const (
	Active   = "active"
	Reserved = "reserved" // kept for a card that has not asked
	Offered  = "offered"
	Released = "released"
	Expired  = "expired"
	Declined = "declined" // in use by somebody else, a client says
)

// offerTime is how long an offered address waits for its request; declineTime is
// how long one that a client found taken is left alone.
const (
	offerTime   = time.Minute
	declineTime = 10 * time.Minute
)

// Lease is what one card has, or had.
type Lease struct {
	IP       netip.Addr
	MAC      net.HardwareAddr
	ClientID []byte
	Hostname string
	Starts   time.Time
	Ends     time.Time
	State    string
}

// Server is one DHCP server. New reads the log; Run serves.
type Server struct {
	c     Config
	ready chan struct{}
	log   *journal

	mu       sync.Mutex            // guards the table below
	leases   map[netip.Addr]*Lease // every address that was ever given
	byMAC    map[string]*Lease     // the newest lease of a card
	reserved map[string]netip.Addr
	next     netip.Addr // where the search for a never-used address goes on
	failure  error
	serving  bool
	warned   bool // that the range is used up
}

// New reads the lease log and prepares a server.
func New(c Config) (*Server, error) {
	c.DefaultLease = cmp.Or(c.DefaultLease, 10*time.Minute)
	c.MaxLease = cmp.Or(c.MaxLease, 2*time.Hour)
	c.MinLease = cmp.Or(c.MinLease, time.Minute)
	if c.Now == nil {
		c.Now = time.Now
	}
	if !c.Subnet.Contains(c.First) || !c.Subnet.Contains(c.Last) || c.Last.Less(c.First) {
		return nil, fmt.Errorf("dhcp: range %s - %s is not in %s: %w", c.First, c.Last, c.Subnet, errdefs.ErrInvalidArgument)
	}
	s := &Server{
		c: c, ready: make(chan struct{}), leases: map[netip.Addr]*Lease{}, byMAC: map[string]*Lease{},
		reserved: map[string]netip.Addr{}, next: c.First,
	}
	book, err := readBook(c.LeaseFile)
	if err != nil {
		return nil, err
	}
	for _, l := range book.leases {
		s.put(&l)
	}
	for mac, ip := range book.reserved {
		s.reserved[mac] = ip
	}
	return s, nil
}

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "dhcp" }

// put makes l the address's lease and its card's newest.
func (s *Server) put(l *Lease) {
	if old := s.leases[l.IP]; old != nil && s.byMAC[string(old.MAC)] == old {
		delete(s.byMAC, string(old.MAC))
	}
	s.leases[l.IP] = l
	if l.State != Declined {
		s.byMAC[string(l.MAC)] = l
	}
}

// current is a lease's state now.
func (s *Server) current(l *Lease) string {
	if (l.State == Active || l.State == Offered || l.State == Declined) && !s.c.Now().Before(l.Ends) {
		return Expired
	}
	return l.State
}

// free says whether an address may be given to a card.
func (s *Server) free(ip netip.Addr, mac net.HardwareAddr) bool {
	if !s.c.Subnet.Contains(ip) || ip == s.c.Server || ip == s.c.Router {
		return false
	}
	for other, kept := range s.reserved {
		if kept == ip {
			return other == string(mac)
		}
	}
	if ip.Less(s.c.First) || s.c.Last.Less(ip) || slices.Contains(s.c.Exclude, ip) {
		return false
	}
	l := s.leases[ip]
	if l == nil || l.State != Declined && bytes.Equal(l.MAC, mac) {
		return true
	}
	state := s.current(l)
	return state == Expired || state == Released
}

// choose finds the address for a card: its reservation, the one that it has or
// had, the one that it asks for, one that nobody had, the one longest unused.
func (s *Server) choose(mac net.HardwareAddr, wish netip.Addr) (netip.Addr, bool) {
	if ip, ok := s.reserved[string(mac)]; ok {
		return ip, true
	}
	if l := s.byMAC[string(mac)]; l != nil && s.free(l.IP, mac) {
		return l.IP, true
	}
	if wish.IsValid() && s.free(wish, mac) {
		return wish, true
	}
	for ; s.next.IsValid() && !s.c.Last.Less(s.next); s.next = s.next.Next() {
		if s.leases[s.next] == nil && s.free(s.next, mac) {
			return s.next, true
		}
	}
	var oldest *Lease
	for _, l := range s.leases {
		if s.free(l.IP, mac) && (oldest == nil || l.Ends.Before(oldest.Ends)) {
			oldest = l
		}
	}
	if oldest == nil {
		return netip.Addr{}, false
	}
	return oldest.IP, true
}

// Leases lists all that the server knows, by address.
func (s *Server) Leases() []Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Lease
	for _, l := range s.leases {
		shown := *l
		shown.State = s.current(l)
		all = append(all, shown)
	}
	for mac, ip := range s.reserved {
		if l := s.leases[ip]; l == nil || string(l.MAC) != mac {
			all = append(all, Lease{IP: ip, MAC: net.HardwareAddr(mac), State: Reserved})
		}
	}
	slices.SortFunc(all, func(a, b Lease) int { return a.IP.Compare(b.IP) })
	return all
}

// Reserve keeps an address for a card: the given one, or the next free one. It
// is on disk when Reserve returns.
func (s *Server) Reserve(mac net.HardwareAddr, ip netip.Addr) (Lease, error) {
	s.mu.Lock()
	old, had := s.reserved[string(mac)]
	if !ip.IsValid() {
		if had {
			ip = old
		} else {
			var ok bool
			if ip, ok = s.choose(mac, netip.Addr{}); !ok {
				s.mu.Unlock()
				return Lease{}, fmt.Errorf("reserve an address for %s: the range is used up: %w", mac, errdefs.ErrResourceExhausted)
			}
		}
	}
	if !s.reservable(ip, mac) {
		s.mu.Unlock()
		return Lease{}, fmt.Errorf("reserve %s for %s: it is not free in %s: %w", ip, mac, s.c.Subnet, errdefs.ErrAlreadyExists)
	}
	s.reserved[string(mac)] = ip
	s.mu.Unlock()
	l := Lease{IP: ip, MAC: mac, State: Reserved}
	if err := s.record(formatReservation(mac, ip)); err != nil {
		return Lease{}, err
	}
	return l, nil
}

// reservable: reservations may lie outside of the range, but not on a machine.
func (s *Server) reservable(ip netip.Addr, mac net.HardwareAddr) bool {
	inRange := !ip.Less(s.c.First) && !s.c.Last.Less(ip)
	if inRange {
		return s.free(ip, mac)
	}
	for other, kept := range s.reserved {
		if kept == ip && other != string(mac) {
			return false
		}
	}
	return s.c.Subnet.Contains(ip) && ip != s.c.Server && ip != s.c.Router
}

// Release takes an address back.
func (s *Server) Release(ip netip.Addr) error {
	s.mu.Lock()
	l := s.leases[ip]
	if l == nil || s.current(l) != Active {
		s.mu.Unlock()
		return fmt.Errorf("release %s: no active lease: %w", ip, errdefs.ErrNotFound)
	}
	released := s.release(l)
	s.mu.Unlock()
	return s.record(released)
}

// release ends a lease and returns what the log must say.
func (s *Server) release(l *Lease) []byte {
	ended := *l
	ended.State, ended.Ends = Released, s.c.Now()
	s.put(&ended)
	return formatLease(ended)
}

// record waits until text is on disk.
func (s *Server) record(text []byte) error {
	if s.log == nil {
		return fmt.Errorf("write lease log: the server does not run: %w", errdefs.ErrUnavailable)
	}
	done := make(chan error, 1)
	s.log.append(entry{text: text, compact: true, done: func(err error) { done <- err }})
	select {
	case err := <-done:
		return err
	case <-s.log.stopped:
		return fmt.Errorf("write lease log: the server has ended: %w", errdefs.ErrUnavailable)
	}
}

// Facts are the server's state.
type Facts struct {
	Serving bool
	Error   error
	Active  int
	Free    int
	Config  string // the text of ConfigFile
}

// Facts says how the server is.
func (s *Server) Facts() Facts {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := Facts{Serving: s.serving, Error: s.failure, Config: exportConfig(s.c)}
	for _, l := range s.leases {
		if s.current(l) == Active {
			f.Active++
		}
	}
	nobody := net.HardwareAddr{0xff}
	for ip := s.c.First; !s.c.Last.Less(ip); ip = ip.Next() {
		if s.free(ip, nobody) {
			f.Free++
		}
	}
	return f
}

func (s *Server) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serving = false
	s.failure = errors.Join(s.failure, err)
	return err
}
