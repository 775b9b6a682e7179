package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// Ping sends one ICMP echo request (RFC 792) and returns how long the answer took.
func Ping(ctx context.Context, addr netip.Addr) (time.Duration, error) {
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return 0, fmt.Errorf("ping %s: %w", addr, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	start := time.Now()
	id := int(start.UnixNano() & 0xffff)
	echo := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: 1, Data: []byte("ingot")}}
	request, err := echo.Marshal(nil)
	if err != nil {
		return 0, fmt.Errorf("ping %s: %w", addr, err)
	}
	if _, err := c.WriteTo(request, &net.IPAddr{IP: addr.AsSlice()}); err != nil {
		return 0, fmt.Errorf("ping %s: %w", addr, err)
	}
	answer := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(answer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, fmt.Errorf("ping %s: no answer: %w", addr, context.Cause(ctx))
		}
		if err != nil {
			return 0, fmt.Errorf("ping %s: %w", addr, err)
		}
		m, err := icmp.ParseMessage(1, answer[:n])
		if err != nil || m.Type != ipv4.ICMPTypeEchoReply || from.String() != addr.String() {
			continue
		}
		if body, ok := m.Body.(*icmp.Echo); ok && body.ID == id {
			return time.Since(start), nil
		}
	}
}
