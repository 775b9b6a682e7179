// Package dhcp is a DHCPv4 server (RFC 2131, RFC 2132) for one interface, and its
// lease log. No acknowledgement leaves before its lease is on disk; leases that
// are acknowledged together share one write. Other subnets reach it by relays
// (RFC 3046). Before it needs an address it asks by ARP whether anybody uses it.
// It finds other DHCP servers on the segment, but serves beside them. It keeps
// isc-dhcp-server's files, and reads its lease log, to take its place. It decides
// addresses by the card's MAC and not by the client identifier, because copies of
// one disk image share the latter. It serves Ethernet cards only, and does not
// speak BOOTP or DHCPv6.
package dhcp

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Config says what a server gives away.
type Config struct {
	Interface string
	Server    netip.Addr // our own address on Interface
	Subnets   []Subnet   // one holds Server; the others are reached by relays
	// Reservations are kept beside those that Reserve makes.
	Reservations []Reservation
	// MicroVM is the NAMESPACE/NAME of the microVM that has a card; empty: none. It is
	// asked each time, if there is a reservation for a microVM, and must not block.
	MicroVM func(net.HardwareAddr) string
	// Taken says whether an address is another's than a card's, who has not asked this server
	// for it. It must not block. nil: none is.
	Taken func(netip.Addr, net.HardwareAddr) bool
	// Authoritative servers refuse what is wrong on their segment (NAK); others
	// keep silent about clients that they do not know.
	Authoritative bool

	DefaultLease, MaxLease, MinLease time.Duration // 0: those of the constants

	LeaseFile    string // in the form of ISC's dhcpd.leases
	ConfigFile   string // an export for people and scripts: dhcpd.conf
	DefaultsFile string // likewise: /etc/default/isc-dhcp-server

	// Settle is how long the server listens for another one, and probes its first
	// addresses, before it answers. Messages that come meanwhile wait. 0: 0.3 s.
	Settle time.Duration
	Log    *slog.Logger
	Now    func() time.Time // nil: time.Now
}

// How long leases are where nobody says otherwise.
const (
	DefaultLease = 10 * time.Minute
	MaxLease     = 2 * time.Hour
	MinLease     = time.Minute
)

// Subnet is a network and what its clients get.
type Subnet struct {
	Prefix  netip.Prefix
	Ranges  []Range        // for whoever asks
	Exclude []netip.Prefix // never given to anybody, nor reserved
	Options Options

	DefaultLease, MaxLease, MinLease time.Duration // 0: the server's

	line int // of a file that says so
}

// Range is the addresses from First to Last.
type Range struct {
	First, Last netip.Addr
}

// Reservation keeps an address for a client: the one that has the MAC, else that is
// the microVM, else that has the client identifier, else that calls itself so.
type Reservation struct {
	IP       netip.Addr
	MAC      net.HardwareAddr
	MicroVM  string // NAMESPACE/NAME, whatever its MAC is
	ClientID []byte
	Name     string

	fixed bool // by the configuration
}

// The states of a lease.
const (
	Active   = "active"
	Reserved = "reserved" // kept for a client that has not asked
	Offered  = "offered"
	Released = "released"
	Expired  = "expired"
	Declined = "declined" // in use by somebody else, a client or ARP says
)

// Lease is what one client has, or had.
type Lease struct {
	IP       netip.Addr
	MAC      net.HardwareAddr
	ClientID []byte
	Hostname string
	MicroVM  string // that the address is kept for
	Starts   time.Time
	Ends     time.Time
	State    string
	Reserved bool // the address is kept for the client, in any state
}

// Server is one DHCP server. New only allocates; Run reads the log and serves.
type Server struct {
	c     Config
	own   addr4
	pools []*pool
	ready chan struct{}
	log   *journal
	clean bool // the log on disk is ours, whole and free of old entries

	latency latency

	mu        sync.Mutex // guards all below
	leases    map[addr4]*record
	byMAC     map[[6]byte]*record // the newest lease of a card
	decliners map[[6]byte]decliner
	byID      map[string]*record // likewise of a client identifier
	named     map[string]*record // the lease of a host name, in lower case
	booked    reservations
	foreign   map[addr4]Foreign
	count     Counters
	last      struct{ conflict, exhausted time.Time }
	quiet     quiet
	watches   map[chan struct{}]bool // poked when something may have changed
	notes     []func()               // for the log, once mu is unlocked
	failure   error
	serving   bool
}

// Counters count since the server began.
type Counters struct {
	Offers, Acks, Naks, Declines, Releases, Informs uint64
	Exhausted                                       uint64 // DISCOVERs for which no address was free
	Conflicts                                       uint64 // addresses that ARP found with another card
	Malformed                                       uint64
	Received                                        [kindInform + 1]uint64 // by the number of the message's type; 0: others
}

// MessageTypes are the names of DHCP's messages, by their numbers.
var MessageTypes = [...]string{"other", "discover", "offer", "request", "decline", "ack", "nak", "release", "inform"}

// New prepares a server.
func New(c Config) (*Server, error) {
	c.DefaultLease = cmp.Or(c.DefaultLease, DefaultLease)
	c.MaxLease = cmp.Or(c.MaxLease, MaxLease)
	c.MinLease = cmp.Or(c.MinLease, MinLease)
	c.Settle = cmp.Or(c.Settle, 300*time.Millisecond)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		c: c, own: from(c.Server), ready: make(chan struct{}),
		leases: map[addr4]*record{}, byMAC: map[[6]byte]*record{}, decliners: map[[6]byte]decliner{}, byID: map[string]*record{}, named: map[string]*record{},
		booked: newReservations(), foreign: map[addr4]Foreign{}, watches: map[chan struct{}]bool{},
	}
	for _, subnet := range c.Subnets {
		p, err := newPool(c, subnet)
		if err != nil {
			return nil, fmt.Errorf("dhcp: subnet %s: %w", subnet.Prefix, err)
		}
		for _, other := range s.pools {
			if other.prefix.Overlaps(p.prefix) {
				return nil, fmt.Errorf("dhcp: subnets %s and %s overlap: %w", other.prefix, p.prefix, errdefs.ErrInvalidArgument)
			}
		}
		s.pools = append(s.pools, p)
	}
	if s.pool(s.own) == nil {
		return nil, fmt.Errorf("dhcp: no subnet holds the server's address, %s: %w", c.Server, errdefs.ErrInvalidArgument)
	}
	for _, r := range c.Reservations {
		p := s.pool(from(r.IP))
		if p == nil || !p.keepable(from(r.IP)) {
			return nil, fmt.Errorf("dhcp: reservation of %s: it is in no subnet, or not to be given: %w", r.IP, errdefs.ErrInvalidArgument)
		}
		r.fixed = true
		if err := s.bookTwice(r); err != nil {
			return nil, err
		}
		s.booked.add(r)
	}
	return s, nil
}

// bookTwice is an error if another client has the address.
func (s *Server) bookTwice(r Reservation) error {
	if old := s.booked.byIP[from(r.IP)]; old != nil && !old.equal(r) {
		return fmt.Errorf("dhcp: reservation of %s: it is reserved twice, for %s and %s: %w", r.IP, old.client(), r.client(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// load fills the table from the log.
func (s *Server) load() error {
	book, err := readBook(s.c.LeaseFile)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clean, s.leases = book.clean, book.leases
	// A client may have several records. The newest is its, an active one before
	// all others.
	all := slices.SortedFunc(maps.Values(s.leases), func(a, b *record) int {
		return cmp.Or(cmp.Compare(s.current(b), s.current(a)), cmp.Compare(a.starts, b.starts), cmp.Compare(a.ip, b.ip))
	})
	for _, r := range all {
		s.index(r)
		if !r.unnamed {
			s.claim(r)
		}
	}
	for _, r := range book.reserved {
		if err := s.bookTwice(r); err != nil { // the configuration's is newer
			s.c.Log.Warn("an address is not kept any more for whom it was reserved", "err", err)
			continue
		}
		if kept := s.configured(r); kept != nil && kept.IP != r.IP {
			err := fmt.Errorf("dhcp: reservation of %s for %s: the configuration reserves %s", r.IP, r.client(), kept.IP)
			s.c.Log.Warn("an address is not kept any more for whom it was reserved", "err", err)
			continue
		}
		if s.booked.byIP[from(r.IP)] == nil {
			s.booked.add(r)
		}
	}
	return nil
}

// configured is the address that the configuration keeps for the client of a reservation,
// in its subnet.
func (s *Server) configured(r Reservation) *Reservation {
	p := s.pool(from(r.IP))
	m, err := r.asMessage()
	if p == nil || err != nil {
		return nil
	}
	if kept := s.booked.of(p, m, r.Name); kept != nil && kept.fixed {
		return kept
	}
	return nil
}

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "dhcp" }

// Leases lists all that the server knows, by address.
func (s *Server) Leases() []Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Lease, 0, len(s.leases))
	for _, r := range s.leases {
		all = append(all, s.shown(r))
	}
	for ip, b := range s.booked.byIP {
		if r := s.leases[ip]; r == nil || s.current(r) != stateActive {
			kept := reserved(*b)
			if r == nil {
				all = append(all, kept)
				continue
			}
			i := slices.IndexFunc(all, func(l Lease) bool { return l.IP == b.IP })
			all[i] = kept
		}
	}
	slices.SortFunc(all, func(a, b Lease) int { return a.IP.Compare(b.IP) })
	return all
}

// shown is a record as a lease, with its state now.
func (s *Server) shown(r *record) Lease {
	l := r.lease()
	l.State = s.current(r).String()
	if b := s.booked.byIP[r.ip]; b != nil {
		l.MicroVM = b.MicroVM
		m := &message{mac: r.mac, id: []byte(r.id), hostname: []byte(r.hostname), vm: s.microVM(r.mac)}
		p := s.pool(r.ip)
		l.Reserved = p != nil && s.booked.of(p, m, s.name(m)) == b
	}
	return l
}

// Reserve keeps an address for a client: r's, or one that is free if r has none.
// It is on disk when Reserve returns.
func (s *Server) Reserve(r Reservation) (Lease, error) {
	s.mu.Lock()
	text, err := s.reserve(&r)
	s.changed()
	wait := s.order(text, false)
	s.mu.Unlock()
	if err == nil {
		err = wait()
	}
	if err != nil {
		to := "an address"
		if r.IP.IsValid() {
			to = r.IP.String()
		}
		return Lease{}, fmt.Errorf("reserve %s for %s: %w", to, r.client(), err)
	}
	return reserved(r), nil
}

// reserved is a reservation as a lease that nobody has.
func reserved(r Reservation) Lease {
	return Lease{IP: r.IP, MAC: r.MAC, ClientID: r.ClientID, Hostname: r.Name, MicroVM: r.MicroVM, State: Reserved, Reserved: true}
}

// reserve changes the table, and says what the log must.
func (s *Server) reserve(r *Reservation) (text []byte, err error) {
	if s.log == nil {
		return nil, errNotRunning
	}
	m, err := r.asMessage()
	if err != nil {
		return nil, err
	}
	p := s.pool(from(r.IP))
	if !r.IP.IsValid() {
		p = s.pool(s.own)
		ip, ok := s.choose(p, m)
		if !ok {
			return nil, fmt.Errorf("the range is used up: %w", errdefs.ErrResourceExhausted)
		}
		r.IP = ip.netip()
	}
	ip := from(r.IP)
	switch {
	case p == nil:
		return nil, fmt.Errorf("ip: it is not in %s: %w", s.subnets(), errdefs.ErrInvalidArgument)
	case !p.keepable(ip):
		return nil, fmt.Errorf("ip: it is not for clients in %s: %w", p.prefix, errdefs.ErrInvalidArgument)
	case !s.free(p, ip, m, true):
		return nil, fmt.Errorf("another client has it: %w", errdefs.ErrAlreadyExists)
	}
	if old := s.booked.of(p, m, r.Name); old != nil && old.fixed {
		if old.IP != r.IP {
			return nil, fmt.Errorf("the configuration reserves %s: %w", old.IP, errdefs.ErrAlreadyExists)
		}
		return nil, nil
	} else if old != nil {
		s.booked.remove(old)
		text = formatUnreserved(text, *old)
		p.rewind() // the search may have passed it
	}
	s.booked.add(*r)
	return formatReservation(text, *r), nil
}

// subnets are all that the server knows.
func (s *Server) subnets() string {
	var all []string
	for _, p := range s.pools {
		all = append(all, p.prefix.String())
	}
	return strings.Join(all, ", ")
}

// Unreserve ends the reservation of an address, which Reserve made; those of a
// MAC or of a microVM, if there is no address.
func (s *Server) Unreserve(r Reservation) error {
	s.mu.Lock()
	text, err := s.unreserve(r)
	s.changed()
	wait := s.order(text, false)
	s.mu.Unlock()
	if err == nil {
		err = wait()
	}
	if err != nil {
		who := r.client()
		if r.IP.IsValid() {
			who = r.IP.String()
		}
		return fmt.Errorf("unreserve %s: %w", who, err)
	}
	return nil
}

// unreserve changes the table, and says what the log must.
func (s *Server) unreserve(of Reservation) (text []byte, err error) {
	if s.log == nil {
		return nil, errNotRunning
	}
	var found []*Reservation
	for _, r := range s.booked.byIP {
		if !r.fixed && (!of.IP.IsValid() || r.IP == of.IP) && (len(of.MAC) == 0 || bytes.Equal(r.MAC, of.MAC)) && (of.MicroVM == "" || r.MicroVM == of.MicroVM) {
			found = append(found, r)
		}
	}
	if len(found) == 0 || !of.IP.IsValid() && len(of.MAC) == 0 && of.MicroVM == "" {
		return nil, fmt.Errorf("nothing is reserved, or by the configuration: %w", errdefs.ErrNotFound)
	}
	for _, r := range found {
		s.booked.remove(r)
		text = formatUnreserved(text, *r)
		if p := s.pool(from(r.IP)); p != nil {
			p.rewind() // the search may have passed it
		}
	}
	return text, nil
}

// Release takes an address back, also one that is put aside. Scripts that read the log do not see the lease
// any more when Release returns.
func (s *Server) Release(ip netip.Addr) error {
	s.mu.Lock()
	r := s.leases[from(ip)]
	if r == nil || s.ended(r) || r.state == stateOffered {
		s.mu.Unlock()
		return fmt.Errorf("release %s: no active lease: %w", ip, errdefs.ErrNotFound)
	}
	if s.log == nil {
		s.mu.Unlock()
		return errNotRunning
	}
	if r.state == stateDeclined { // nobody's
		r.ends = s.seconds() - 1
		s.file(r)
	} else {
		s.release(r)
	}
	s.changed()
	wait := s.order(formatRecord(nil, r), true)
	s.mu.Unlock()
	return wait()
}

var errNotRunning = fmt.Errorf("write lease log: the server does not run: %w", errdefs.ErrUnavailable)

// order has the log say text, and returns what waits for that. If it can't be
// written, the server ends, and the next one goes by the log.
func (s *Server) order(text []byte, alone bool) (wait func() error) {
	if len(text) == 0 {
		return func() error { return nil }
	}
	return s.log.order(text, alone)
}

// Facts are the server's state.
type Facts struct {
	Serving bool
	Error   error
	Active  int
	Free    int
	States  map[string]int // leases by state, also of those that ended
	Kept    int            // reservations
	Foreign []Foreign      // other DHCP servers on the segment
	Counters
	Latency
	LastConflict, LastExhausted time.Time // zero: never
	DefaultLease, MaxLease      time.Duration
	Ranges                      []Range // without what is excluded, of all subnets
	Config                      string  // the text of ConfigFile
}

// Facts says how the server is.
func (s *Server) Facts() Facts {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := Facts{
		Serving: s.serving, Error: s.failure, Counters: s.count, Foreign: s.foreigners(), LastConflict: s.last.conflict,
		LastExhausted: s.last.exhausted, DefaultLease: s.c.DefaultLease, MaxLease: s.c.MaxLease, Config: exportConfig(s.c),
		States: map[string]int{}, Kept: len(s.booked.byIP), Latency: s.latency.read(),
	}
	for _, p := range s.pools {
		f.Free += p.size()
		for _, x := range p.spans {
			f.Ranges = append(f.Ranges, Range{x.first.netip(), x.last.netip()})
		}
	}
	for ip, r := range s.leases {
		state := s.current(r)
		f.States[state.String()]++
		if p := s.pool(ip); p != nil && p.dynamic(ip) && state != stateExpired && state != stateReleased {
			f.Free--
		}
	}
	f.Active = f.States[Active]
	for ip := range s.booked.byIP {
		r := s.leases[ip]
		taken := r != nil && s.current(r) != stateExpired && s.current(r) != stateReleased
		if p := s.pool(ip); p != nil && p.dynamic(ip) && !taken {
			f.Free--
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
