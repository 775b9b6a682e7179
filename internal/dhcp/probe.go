package dhcp

import (
	"bytes"
	"container/heap"
	"context"
	"encoding/binary"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// wanted is how many addresses are kept that ARP found free.
	wanted = 256
	// An address is free if nobody answers for this long (RFC 5227 lets a host
	// wait longer, but it asks before it uses an address, and we hear that).
	probeTime = 200 * time.Millisecond
	// fresh is how long that holds. ARP of its user ends it earlier.
	fresh = 5 * time.Minute
	// burst is how many probes are sent at once, each spread apart.
	burst  = 32
	spread = 5 * time.Millisecond
)

// probe keeps addresses at hand that ARP found free, so that no offer waits.
func (s *Server) probe(ctx context.Context, wire *sockets) error {
	p := s.pool(s.own)
	for {
		s.mu.Lock()
		ips := s.candidates(p)
		s.mu.Unlock()
		for range 2 { // a frame may be lost
			for i, ip := range ips {
				if i%burst == burst-1 && !sleep(ctx, spread) {
					return nil
				}
				s.askARP(wire, ip)
			}
		}
		if len(ips) > 0 && !sleep(ctx, probeTime) {
			return nil
		}
		s.mu.Lock()
		s.settle(p)
		s.mu.Unlock()
		if len(ips) > 0 && !sleep(ctx, spread) {
			return nil
		}
		timer := time.NewTimer(fresh / 5)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-p.low:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// wake has more addresses probed, if few are left.
func (p *pool) wake() {
	if p.local && len(p.ready) < wanted/2 {
		poke(p.low)
	}
}

// candidates takes addresses that are to be probed, and names the old ones that
// were: they may be given meanwhile.
func (s *Server) candidates(p *pool) []addr4 {
	var ips []addr4
	now := s.c.Now()
	for i := range p.ready {
		if now.Sub(p.ready[i].at) > fresh {
			ips = append(ips, p.ready[i].ip)
			p.ready[i].at = now
		}
	}
	nobody := &message{}
	for len(p.ready)+len(p.probing) < wanted {
		ip, ok := p.unused(s.leases)
		if !ok {
			r := s.oldest(p, nobody)
			if r == nil {
				break
			}
			heap.Remove(&p.ended, int(r.place))
			ip = r.ip
		} else if !s.free(p, ip, nobody, false) {
			continue
		}
		p.probing = append(p.probing, ip)
	}
	return append(ips, p.probing...)
}

// settle makes ready what was probed and did not answer.
func (s *Server) settle(p *pool) {
	for _, ip := range p.probing {
		p.ready = append(p.ready, probed{ip, s.c.Now()})
	}
	p.probing = p.probing[:0]
}

// askARP asks who has an address, in nobody's name (RFC 5227, section 2.1.1).
func (s *Server) askARP(wire *sockets, ip addr4) {
	if err := wire.sendFrame(broadcastMAC, unix.ETH_P_ARP, arpProbe(wire.iface.HardwareAddr, ip)); err != nil {
		s.mu.Lock()
		s.note(s.c.Log.Warn, "send ARP probe", "err", err)
		s.unlock()
	}
}

func arpProbe(from net.HardwareAddr, ip addr4) []byte {
	b := make([]byte, 42)
	copy(b, broadcastMAC[:])
	copy(b[6:], from)
	be := binary.BigEndian
	be.PutUint16(b[12:], unix.ETH_P_ARP)
	copy(b[14:], []byte{0, 1, 8, 0, 6, 4, 0, 1}) // Ethernet, IPv4, request
	copy(b[22:], from)
	be.PutUint32(b[38:], uint32(ip))
	return b
}

// listenARP hears who uses which address, asked or not.
func (s *Server) listenARP(ctx context.Context, wire *sockets) error {
	return packets(ctx, wire.iface, wire.arp, func(b []byte) {
		if len(b) < 42 || !bytes.Equal(b[14:20], []byte{0, 1, 8, 0, 6, 4}) {
			return
		}
		ip := addr4(binary.BigEndian.Uint32(b[28:]))
		if ip != 0 && !bytes.Equal(b[22:28], wire.iface.HardwareAddr) {
			s.mu.Lock()
			s.seen(ip, [6]byte(b[22:28]))
			s.changed()
			s.unlock()
		}
	})
}

// seen takes note that a card uses an address.
func (s *Server) seen(ip addr4, mac [6]byte) {
	p := s.pool(ip)
	if p == nil || !p.local || !p.dynamic(ip) {
		return
	}
	r := s.leases[ip]
	switch {
	case r != nil && r.mac == mac:
		if s.ended(r) { // it goes on without a lease: not for others now
			p.drop(ip)
			r.busy = s.seconds() + declineTime
			s.file(r)
		}
	case r != nil && s.current(r) == stateActive:
		s.conflict()
		s.note(s.c.Log.Warn, "two cards use one address", "ip", ip, "mac", macString(r.mac), "other", macString(mac))
	case r != nil && s.current(r) == stateDeclined:
	default:
		s.conflict()
		s.note(s.c.Log.Warn, "a free address is in use", "ip", ip, "mac", macString(mac))
		p.drop(ip)
		if r == nil {
			r = &record{ip: ip, place: nowhere}
			s.leases[ip] = r
		}
		s.putAside(r, mac)
	}
}

func (s *Server) conflict() {
	s.count.Conflicts++
	s.last.conflict = s.c.Now()
}

// drop takes an address out of those at hand.
func (p *pool) drop(ip addr4) {
	for i, x := range p.ready {
		if x.ip == ip {
			p.ready = append(p.ready[:i], p.ready[i+1:]...)
			return
		}
	}
	for i, x := range p.probing {
		if x == ip {
			p.probing = append(p.probing[:i], p.probing[i+1:]...)
			return
		}
	}
}
