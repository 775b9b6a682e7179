package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

const (
	serverPort = 67
	clientPort = 68
)

// sockets are the server's ways to its interface.
type sockets struct {
	iface  *net.Interface
	own    addr4
	server *net.UDPConn
	raw    int      // sends whole frames
	arp    *os.File // ARP, whole frames
}

func openSockets(ctx context.Context, iface *net.Interface, own addr4) (_ *sockets, err error) {
	w := &sockets{iface: iface, own: own, raw: -1}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if w.server, err = listen(ctx, iface.Name); err != nil {
		return nil, err
	}
	if w.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	w.arp, err = listenPackets(iface, unix.ETH_P_ARP, nil)
	return w, err
}

func (w *sockets) Close() error {
	var errs []error
	if w.server != nil {
		errs = append(errs, w.server.Close())
	}
	if w.raw >= 0 {
		errs = append(errs, unix.Close(w.raw))
	}
	if w.arp != nil {
		errs = append(errs, w.arp.Close())
	}
	return errors.Join(errs...)
}

// listen opens the server's port on one interface only, where no other server
// may have it.
func listen(ctx context.Context, iface string) (c *net.UDPConn, err error) {
	var control error
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		err := c.Control(func(fd uintptr) {
			control = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				receiveBuffer(int(fd)),
				unix.BindToDevice(int(fd), iface),
			)
		})
		return errors.Join(err, control)
	}}
	err = run.Patiently(ctx, unix.EADDRINUSE, func() error {
		p, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf("0.0.0.0:%d", serverPort))
		if err == nil {
			c = p.(*net.UDPConn)
		}
		return err
	})
	return c, err
}

// receiveBuffer keeps what comes while the server is busy. Root may have more of
// it than net.core.rmem_max.
func receiveBuffer(fd int) error {
	const size = 4 << 20
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size)
}

// toClients lets through UDP packets, not fragments, to the clients' port.
var toClients = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 23},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 6},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 20},
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x1fff, Jt: 4},
	{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 14},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 16},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: clientPort, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
}

// listenPackets opens a socket for the frames of one protocol on an interface.
func listenPackets(iface *net.Interface, protocol uint16, filter []unix.SockFilter) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if filter != nil {
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program)
	}
	if err == nil { // nothing comes before it is bound, since its protocol is 0
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: iface.Index})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "packets of "+iface.Name), nil
}

// packets calls f with each frame that comes in, until ctx ends.
// It fails if the interface is gone: one of the same name is another.
func packets(ctx context.Context, iface *net.Interface, file *os.File, f func([]byte)) error {
	stop := context.AfterFunc(ctx, func() { file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := file.SyscallConn()
	if err != nil {
		return err
	}
	buffer := make([]byte, 2048)
	for {
		var n int
		var from unix.Sockaddr
		var failed error
		err := c.Read(func(fd uintptr) bool {
			n, from, failed = unix.Recvfrom(int(fd), buffer, 0)
			return failed != unix.EAGAIN
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("receive packets: %w", err)
		case errors.Is(failed, unix.ENETDOWN):
			if now, err := net.InterfaceByName(iface.Name); err != nil || now.Index != iface.Index {
				return fmt.Errorf("receive packets: interface %s is gone, or replaced by another", iface.Name)
			}
			continue // it is down for a moment
		case errors.Is(failed, unix.EINTR):
			continue
		case failed != nil:
			return fmt.Errorf("receive packets: %w", failed)
		}
		if at, ok := from.(*unix.SockaddrLinklayer); ok && at.Pkttype != unix.PACKET_OUTGOING {
			f(buffer[:n])
		}
	}
}

// sendFrame puts a frame on the wire.
func (w *sockets) sendFrame(to [6]byte, protocol uint16, frame []byte) error {
	at := unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: w.iface.Index, Halen: 6}
	copy(at.Addr[:], to[:])
	return unix.Sendto(w.raw, frame, 0, &at)
}

// sender sends replies, many at a time. It is not for two goroutines.
type sender struct {
	*sockets
	out      *ipv4.PacketConn
	messages []ipv4.Message
	frame    []byte
}

func newSender(w *sockets) *sender { return &sender{sockets: w, out: ipv4.NewPacketConn(w.server)} }

// send sends each reply, and returns the first error.
func (w *sender) send(replies []*reply) error {
	var errs error
	n := 0
	for _, r := range replies {
		switch {
		case len(r.b) == 0:
		case r.route:
			w.route(n, r)
			n++
		default:
			// A client without an address can't be reached by the kernel's routes.
			w.frame = appendFrame(w.frame[:0], w.iface.HardwareAddr, r.mac, w.own, r.to, serverPort, clientPort, r.b)
			if err := w.sendFrame(r.mac, unix.ETH_P_IP, w.frame); err != nil && errs == nil {
				errs = err
			}
		}
	}
	for left := w.messages[:n]; len(left) > 0; {
		sent, err := w.out.WriteBatch(left, 0)
		if err != nil {
			if errs == nil {
				errs = err
			}
			sent = max(sent, 0) + 1 // this one can't be sent: go on with the others
		}
		left = left[min(sent, len(left)):]
	}
	return errs
}

// route makes message n of a batch.
func (w *sender) route(n int, r *reply) {
	if n == len(w.messages) {
		w.messages = append(w.messages, ipv4.Message{
			Buffers: make([][]byte, 1), Addr: &net.UDPAddr{IP: make(net.IP, 4)},
		})
	}
	to := w.messages[n].Addr.(*net.UDPAddr)
	binary.BigEndian.PutUint32(to.IP, uint32(r.to))
	to.Port = clientPort
	if r.relay {
		to.Port = serverPort
	}
	w.messages[n].Buffers[0] = r.b
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// appendFrame wraps a message in UDP (RFC 768), IPv4 (RFC 791) and Ethernet.
func appendFrame(b []byte, from net.HardwareAddr, to [6]byte, source, destination addr4, sport, dport uint16, message []byte) []byte {
	const ethernet, ip, udp = 14, 20, 8
	b = append(b, make([]byte, ethernet+ip+udp)...)
	copy(b, to[:])
	copy(b[6:], from)
	be := binary.BigEndian
	be.PutUint16(b[12:], unix.ETH_P_IP)
	h := b[ethernet:]
	h[0], h[8], h[9] = 0x45, 64, unix.IPPROTO_UDP
	be.PutUint16(h[2:], uint16(ip+udp+len(message)))
	be.PutUint32(h[12:], uint32(source))
	be.PutUint32(h[16:], uint32(destination))
	be.PutUint16(h[10:], ^sum(0, h[:ip]))
	u := h[ip:]
	be.PutUint16(u, sport)
	be.PutUint16(u[2:], dport)
	be.PutUint16(u[4:], uint16(udp+len(message)))
	b = append(b, message...)
	pseudo := sum(0, b[ethernet+12:ethernet+20])
	pseudo = sum(uint32(pseudo)+unix.IPPROTO_UDP+uint32(udp+len(message)), b[ethernet+ip:])
	checksum := ^pseudo
	if checksum == 0 {
		checksum = 0xffff // 0 would mean that there is none
	}
	be.PutUint16(b[ethernet+ip+6:], checksum)
	return b
}

// sum is the one's complement sum of RFC 1071.
func sum(start uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		start += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start&0xffff + start>>16
	}
	return uint16(start)
}
