package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// packetSocket sends and receives DHCP messages: below IP for an interface that
// has no address yet, with UDP for one that has.
type packetSocket struct {
	fd   int
	file *os.File // the same, on the runtime's poller
	// to is where messages are broadcast; nil with UDP, which is connected.
	to *unix.SockaddrLinklayer
}

const (
	serverPort = 67
	clientPort = 68
)

// htons is for the kernel, which wants a protocol's number in network order.
func htons(n uint16) uint16 { return n<<8 | n>>8 }

// openPacket opens a socket that broadcasts on the card.
func openPacket(card iface) (*packetSocket, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_IP)))
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: card.index, Halen: 6,
		Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: to.Protocol, Ifindex: card.index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet socket: %w", err)
	}
	return &packetSocket{fd, os.NewFile(uintptr(fd), "dhcp"), to}, nil
}

// openUnicast opens a socket to the lease's own server.
func openUnicast(card iface, l lease) (*packetSocket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	steps := []func() error{
		func() error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) },
		func() error { return unix.BindToDevice(fd, card.name) },
		func() error {
			return unix.Bind(fd, &unix.SockaddrInet4{Port: clientPort, Addr: l.address.Addr().As4()})
		},
		func() error {
			if !l.server.IsValid() {
				return unix.EDESTADDRREQ
			}
			return unix.Connect(fd, &unix.SockaddrInet4{Port: serverPort, Addr: l.server.As4()})
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("connect to the server: %w", err)
		}
	}
	return &packetSocket{fd, os.NewFile(uintptr(fd), "dhcp"), nil}, nil
}

func (s *packetSocket) close() { s.file.Close() }

// interrupt ends a receive.
func (s *packetSocket) interrupt() { s.file.SetReadDeadline(time.Unix(1, 0)) }

func (s *packetSocket) send(payload []byte) error {
	if s.to == nil {
		_, err := s.file.Write(payload)
		return err
	}
	return unix.Sendto(s.fd, datagram(payload), 0, s.to)
}

// receive returns the payload of the next datagram for a client. Whoever ends
// ctx calls interrupt; if that was before the deadline is set, ctx tells.
func (s *packetSocket) receive(ctx context.Context, until time.Time) ([]byte, error) {
	if err := s.file.SetReadDeadline(until); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	buf := make([]byte, 2048)
	for {
		n, err := s.file.Read(buf)
		if err != nil {
			return nil, err
		}
		if s.to == nil {
			return buf[:n], nil
		}
		if payload, ok := udpPayload(buf[:n]); ok {
			return payload, nil
		}
	}
}

// datagram puts IP and UDP headers before a payload to 255.255.255.255:67.
func datagram(payload []byte) []byte {
	b := make([]byte, 28, 28+len(payload))
	be := binary.BigEndian
	b[0] = 0x45
	be.PutUint16(b[2:], uint16(28+len(payload)))
	b[8], b[9] = 64, unix.IPPROTO_UDP
	copy(b[16:], []byte{255, 255, 255, 255})
	be.PutUint16(b[20:], clientPort)
	be.PutUint16(b[22:], serverPort)
	be.PutUint16(b[24:], uint16(8+len(payload)))
	b = append(b, payload...)
	be.PutUint16(b[10:], ^sum(0, b[:20]))
	// The pseudo-header: addresses, protocol, length.
	pseudo := uint32(sum(0, b[12:20])) + unix.IPPROTO_UDP + uint32(8+len(payload))
	check := ^sum(pseudo, b[20:])
	if check == 0 {
		check = 0xffff
	}
	be.PutUint16(b[26:], check)
	return b
}

func sum(start uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		start += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start>>16 + start&0xffff
	}
	return uint16(start)
}

// udpPayload is the payload of an IPv4 packet to a DHCP client. Its UDP checksum
// is not looked at: a host leaves it to cards that its guests do not have.
func udpPayload(b []byte) ([]byte, bool) {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != unix.IPPROTO_UDP {
		return nil, false
	}
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if header < 20 || total > len(b) || total < header+8 || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
		return nil, false
	}
	udp := b[header:total]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != clientPort || length < 8 || length > len(udp) {
		return nil, false
	}
	return udp[8:length], true
}
