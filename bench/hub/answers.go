package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// answers is a server that knows nothing: it makes an answer of each question, and
// sends it. What a load generator gets of it is the most that one can measure.
func answers(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for port, answer := range map[int]func([]byte, int) int{67: answerDHCP, 53: answerDNS} {
		group.Go(func() error {
			c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(hubAddr), Port: port})
			if err != nil {
				return err
			}
			c.SetReadBuffer(4 << 20)
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			p := ipv4.NewPacketConn(c)
			messages := make([]ipv4.Message, 64)
			for i := range messages {
				messages[i].Buffers = [][]byte{make([]byte, 2048)}
			}
			for {
				n, err := p.ReadBatch(messages, 0)
				if err != nil {
					return err
				}
				for i := range messages[:n] {
					m := &messages[i]
					whole := m.Buffers[0]
					m.Buffers[0] = whole[:answer(whole[:cap(whole)], m.N)]
				}
				for left := messages[:n]; len(left) > 0; {
					sent, err := p.WriteBatch(left, 0)
					if err != nil {
						return err
					}
					left = left[sent:]
				}
				for i := range messages[:n] {
					messages[i].Buffers[0] = messages[i].Buffers[0][:2048]
				}
			}
		})
	}
	return group.Wait()
}

// The parts of a DHCP message that are used here.
const (
	dhcpXID     = 4
	dhcpYours   = 16
	dhcpRelay   = 24
	dhcpCard    = 28
	dhcpOptions = 240
	discover    = 1
	offer       = 2
	ack         = 5
)

// answerDHCP makes an OFFER of a DISCOVER, and an ACK of a REQUEST.
func answerDHCP(b []byte, _ int) int {
	kind := byte(ack)
	for o := dhcpOptions; o+2 < len(b) && b[o] != 255; o += 2 + int(b[o+1]) {
		if b[o] == 53 && b[o+2] == discover {
			kind = offer
		}
	}
	b[0] = 2
	copy(b[dhcpYours:], []byte{10, b[dhcpXID+1] & 15, b[dhcpXID+2], b[dhcpXID+3]})
	server := netip.MustParseAddr(hubAddr).As4()
	options := append([]byte{53, 1, kind, 51, 4, 0, 0, 2, 88, 1, 4, 255, 240, 0, 0, 54, 4}, server[:]...)
	n := dhcpOptions + copy(b[dhcpOptions:], append(options, 255))
	const smallest = 300
	clear(b[n:smallest])
	return smallest
}

// answerDNS makes an answer of a question, which is all of its message.
func answerDNS(b []byte, n int) int {
	b[2], b[3], b[7] = b[2]|0x80, 0x80, 1
	return len(append(b[:n], 0xc0, 12, 0, 1, 0, 1, 0, 0, 14, 16, 0, 4, 192, 0, 2, 7))
}

// dial opens a socket to the hub in the clients' namespace.
func dial(port int) (c *net.UDPConn, err error) {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its goroutine
		ns, err := unix.Open("/run/netns/clients", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(ns, unix.CLONE_NEWNET)
			unix.Close(ns)
		}
		if err == nil {
			c, err = net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(clientAddr), Port: port}, &net.UDPAddr{IP: net.ParseIP(hubAddr), Port: port})
		}
		result <- err
	}()
	return c, <-result
}

// ask sends a question, and waits a moment for an answer.
func ask(port int, question []byte) ([]byte, error) {
	c, err := dial(port)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	answer := make([]byte, 2048)
	_, err = c.Write(question)
	if err == nil {
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = c.Read(answer)
	}
	if err != nil {
		time.Sleep(time.Millisecond) // a port where nobody listens refuses at once
		return nil, fmt.Errorf("ask port %d: %w", port, err)
	}
	return answer, nil
}

// offers says whether a DHCP server does, for a client that is none of perfdhcp's.
func offers(context.Context) error {
	b := make([]byte, 300)
	b[0], b[1], b[2] = 1, 1, 6
	relay := netip.MustParseAddr(clientAddr).As4()
	copy(b[dhcpRelay:], relay[:])
	copy(b[dhcpCard:], []byte{2, 0xff, 0xff, 0xff, 0xff, 0xff})
	binary.BigEndian.PutUint32(b[dhcpOptions-4:], 0x63825363)
	copy(b[dhcpOptions:], []byte{53, 1, discover, 255})
	_, err := ask(67, b)
	return err
}

// resolves says whether a DNS server does: its answer has an address.
func resolves(context.Context) error {
	b := []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 'h', '0', 5, 'b', 'e', 'n', 'c', 'h', 7, 'e', 'x', 'a', 'm', 'p', 'l', 'e', 0, 0, 1, 0, 1}
	answer, err := ask(53, b)
	if err == nil && answer[7] == 0 {
		err = fmt.Errorf("it answers with code %d and without an address", answer[3]&15)
	}
	return err
}
