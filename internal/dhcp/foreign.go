package dhcp

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Foreign is another DHCP server on the segment.
type Foreign struct {
	Server netip.Addr       // as it calls itself
	MAC    net.HardwareAddr // its, or a relay's
	Offers netip.Addr       // an address that it offered, if it did
	Seen   time.Time
}

const (
	seekAgain    = 2 * time.Minute
	foreignStale = 3 * seekAgain
)

// seekForeign looks again and again who else serves the segment.
func (s *Server) seekForeign(ctx context.Context, wire *sockets) error {
	for {
		wait := seekAgain
		if err := wire.seek(ctx, s.heard); err != nil { // as while the interface is down
			s.mu.Lock()
			s.note(s.c.Log.Warn, "seek other DHCP servers", "err", err)
			s.unlock()
			wait = seekTime
		}
		if !sleep(ctx, wait) {
			return nil
		}
	}
}

// question is a DISCOVER or INFORM of our own card, the former to be answered by
// broadcast.
func question(k kind, mac net.HardwareAddr, own addr4) []byte {
	b := make([]byte, headerSize, smallest)
	b[0], b[1], b[2] = bootRequest, 1, 6
	rand.Read(b[4:8])
	if k == kindDiscover {
		binary.BigEndian.PutUint16(b[10:], flagBroadcast)
		own = 0
	}
	binary.BigEndian.PutUint32(b[12:], uint32(own))
	copy(b[28:], mac)
	b = binary.BigEndian.AppendUint32(b, cookie)
	b = append(b, optionKind, 1, byte(k), optionParameters, 2, optionMask, optionRouter, optionEnd)
	return appendFrame(nil, mac, broadcastMAC, own, broadcast4, clientPort, serverPort, b[:smallest])
}

// heard takes note of another server.
func (s *Server) heard(f Foreign) {
	s.mu.Lock()
	defer s.unlock()
	server := from(f.Server)
	old, known := s.foreign[server]
	if !known {
		maps.DeleteFunc(s.foreign, func(_ addr4, f Foreign) bool { return s.c.Now().Sub(f.Seen) >= foreignStale })
		if len(s.foreign) >= maxForeign {
			return
		}
		s.note(s.c.Log.Warn, "another DHCP server is on the segment", "ip", f.Server, "mac", f.MAC)
	}
	f.Offers, f.Seen = cmp.Or(f.Offers, old.Offers), s.c.Now()
	s.foreign[server] = f
}

// maxForeign keeps a forger from filling the memory.
const maxForeign = 16

// serverOf is who sent a DHCP reply, in a frame, and the address that is in it.
func serverOf(frame []byte) (server, offered addr4) {
	if len(frame) < 14+20 {
		return 0, 0
	}
	begin := 14 + 4*int(frame[14]&0xf) + 8
	if len(frame) < begin+headerSize+4 {
		return 0, 0
	}
	b := frame[begin:]
	if b[0] != bootReply || binary.BigEndian.Uint32(b[headerSize:]) != cookie {
		return 0, 0
	}
	var m message
	if _, err := m.options(b[headerSize+4:]); err != nil {
		return 0, 0
	}
	return m.server, addr4(binary.BigEndian.Uint32(b[16:]))
}

// foreigners are the other servers that were heard lately.
func (s *Server) foreigners() []Foreign {
	var all []Foreign
	for _, f := range s.foreign {
		if s.c.Now().Sub(f.Seen) < foreignStale {
			all = append(all, f)
		}
	}
	slices.SortFunc(all, func(a, b Foreign) int { return cmp.Compare(from(a.Server), from(b.Server)) })
	return all
}
