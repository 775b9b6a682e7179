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

	"golang.org/x/sys/unix"
)

// Foreign is another DHCP server on the segment.
type Foreign struct {
	Server netip.Addr       // as it calls itself
	MAC    net.HardwareAddr // its, or a relay's
	Offers netip.Addr       // an address that it offered, if it did
	Seen   time.Time
}

const (
	seekAgain    = 10 * time.Minute
	seekFirst    = 200 * time.Millisecond
	foreignStale = 3 * seekAgain
)

// seekForeign asks the segment for an address, as a client would, and for options
// alone: whoever answers is another server. dhcpd looks for a second whether an
// address is used before it offers one, but it answers the INFORM at once. What
// is offered is not taken.
func (s *Server) seekForeign(ctx context.Context, wire *sockets) error {
	for wait := seekFirst; ; wait = seekAgain {
		for _, k := range []kind{kindInform, kindDiscover} {
			if err := wire.sendFrame(broadcastMAC, unix.ETH_P_IP, question(k, wire.iface.HardwareAddr, s.own)); err != nil {
				s.mu.Lock()
				s.note(s.c.Log.Warn, "seek other DHCP servers", "err", err)
				s.unlock()
			}
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

// listenForeign hears what other servers say to their clients, and to us.
func (s *Server) listenForeign(ctx context.Context, wire *sockets) error {
	return packets(ctx, wire.iface, wire.client, func(frame []byte) {
		if server, offered := serverOf(frame); server != 0 && server != s.own {
			s.heard(server, offered, slices.Clone(net.HardwareAddr(frame[6:12])))
		}
	})
}

// heard takes note of another server.
func (s *Server) heard(server, offered addr4, mac net.HardwareAddr) {
	s.mu.Lock()
	defer s.unlock()
	old, known := s.foreign[server]
	if !known {
		maps.DeleteFunc(s.foreign, func(_ addr4, f Foreign) bool { return s.c.Now().Sub(f.Seen) >= foreignStale })
		if len(s.foreign) >= maxForeign {
			return
		}
		s.note(s.c.Log.Warn, "another DHCP server is on the segment", "ip", server, "mac", mac)
	}
	s.foreign[server] = Foreign{Server: server.netip(), MAC: mac, Offers: cmp.Or(offered.netip(), old.Offers), Seen: s.c.Now()}
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
