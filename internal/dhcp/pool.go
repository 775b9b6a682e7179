package dhcp

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// pool is a subnet and the order in which its addresses are given: those that
// were probed, those that nobody had yet, the one that ended longest ago.
type pool struct {
	prefix      netip.Prefix
	first, last addr4  // the network's and the broadcast address
	spans       []span // what may be given, in order
	excluded    []span
	options     []option
	initial     uint32 // seconds, of a lease whose client does not ask for any
	shortest    uint32
	longest     uint32
	local       bool // on our own segment, where ARP reaches
	now         int  // spans[now] holds next
	next        addr4
	ended       ends
	ready       []probed      // free when ARP last looked
	probing     []addr4       // ARP is looking
	low         chan struct{} // poked when few are ready
}

// span is the addresses from first to last.
type span struct{ first, last addr4 }

type probed struct {
	ip addr4
	at time.Time
}

func newPool(c Config, n Subnet) (*pool, error) {
	if !n.Prefix.IsValid() || !n.Prefix.Addr().Is4() || n.Prefix.Bits() == 0 {
		return nil, fmt.Errorf("it is no IPv4 subnet: %w", errdefs.ErrInvalidArgument)
	}
	p := &pool{prefix: n.Prefix.Masked(), local: n.Prefix.Contains(c.Server), low: make(chan struct{}, 1)}
	whole := spanOf(p.prefix)
	p.first, p.last = whole.first, whole.last
	options, err := n.Options.encode()
	if err != nil {
		return nil, err
	}
	p.options = options
	if err := p.lifetimes(c, n); err != nil {
		return nil, err
	}
	own := []netip.Addr{c.Server}
	for _, a := range append(own, n.Options.Routers...) {
		p.excluded = append(p.excluded, span{from(a), from(a)})
	}
	if p.prefix.Bits() < 31 {
		p.excluded = append(p.excluded, span{p.first, p.first}, span{p.last, p.last})
	}
	for _, prefix := range n.Exclude {
		if !prefix.Addr().Is4() {
			return nil, fmt.Errorf("exclude %s: it is not of IPv4: %w", prefix, errdefs.ErrInvalidArgument)
		}
		p.excluded = append(p.excluded, spanOf(prefix))
	}
	slices.SortFunc(p.excluded, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	for _, r := range n.Ranges {
		if !p.prefix.Contains(r.First) || !p.prefix.Contains(r.Last) || r.Last.Less(r.First) {
			return nil, fmt.Errorf("range %s - %s is not in it: %w", r.First, r.Last, errdefs.ErrInvalidArgument)
		}
		p.spans = append(p.spans, without4(span{from(r.First), from(r.Last)}, p.excluded)...)
	}
	slices.SortFunc(p.spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	for i := 1; i < len(p.spans); i++ {
		if p.spans[i].first <= p.spans[i-1].last {
			return nil, fmt.Errorf("two ranges hold %s: %w", p.spans[i].first, errdefs.ErrInvalidArgument)
		}
	}
	p.rewind()
	return p, nil
}

func (p *pool) lifetimes(c Config, n Subnet) error {
	initial, shortest, longest := cmp.Or(n.DefaultLease, c.DefaultLease), cmp.Or(n.MinLease, c.MinLease), cmp.Or(n.MaxLease, c.MaxLease)
	if shortest < time.Second || initial < shortest || longest < initial || longest > 1<<31*time.Second {
		return fmt.Errorf("lease times: %s, %s and %s are not minimum, default and maximum: %w", shortest, initial, longest, errdefs.ErrInvalidArgument)
	}
	p.initial, p.shortest, p.longest = uint32(initial/time.Second), uint32(shortest/time.Second), uint32(longest/time.Second)
	return nil
}

func spanOf(p netip.Prefix) span {
	first := from(p.Masked().Addr())
	return span{first, first | addr4(uint64(1)<<(32-p.Bits())-1)}
}

// without4 is what is left of a span; excluded is in order.
func without4(s span, excluded []span) []span {
	var left []span
	for _, x := range excluded {
		if x.last < s.first || s.last < x.first {
			continue
		}
		if s.first < x.first {
			left = append(left, span{s.first, x.first - 1})
		}
		if x.last >= s.last {
			return left
		}
		s.first = x.last + 1
	}
	return append(left, s)
}

// pool is the subnet that holds an address.
func (s *Server) pool(ip addr4) *pool {
	for _, p := range s.pools {
		if p.first <= ip && ip <= p.last {
			return p
		}
	}
	return nil
}

func (p *pool) contains(ip addr4) bool { return p.first <= ip && ip <= p.last }

// dynamic says whether an address is for whoever asks.
func (p *pool) dynamic(ip addr4) bool {
	for _, s := range p.spans {
		if s.first <= ip && ip <= s.last {
			return true
		}
	}
	return false
}

// keepable says whether an address may be reserved: also outside of the ranges.
func (p *pool) keepable(ip addr4) bool {
	for _, x := range p.excluded {
		if x.first <= ip && ip <= x.last {
			return false
		}
	}
	return p.contains(ip)
}

func (p *pool) size() int {
	n := 0
	for _, s := range p.spans {
		n += int(s.last-s.first) + 1
	}
	return n
}

// rewind starts the search for addresses that nobody had at the beginning.
func (p *pool) rewind() {
	p.now, p.next = 0, 0
	if len(p.spans) > 0 {
		p.next = p.spans[0].first
	}
}

// unused is the next address that nobody had.
func (p *pool) unused(leases map[addr4]*record) (addr4, bool) {
	for p.now < len(p.spans) {
		ip := p.next
		if ip < p.spans[p.now].last {
			p.next++
		} else if p.now++; p.now < len(p.spans) {
			p.next = p.spans[p.now].first
		}
		if leases[ip] == nil {
			return ip, true
		}
	}
	return 0, false
}

// ends is a heap (container/heap) of a subnet's records by their end.
type ends []*record

func (h ends) Len() int           { return len(h) }
func (h ends) Less(i, j int) bool { return h[i].ends < h[j].ends }
func (h ends) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = int32(i), int32(j)
}

func (h *ends) Push(x any) {
	r := x.(*record)
	r.place = int32(len(*h))
	*h = append(*h, r)
}

func (h *ends) Pop() any {
	old := *h
	r := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	r.place = nowhere
	return r
}
