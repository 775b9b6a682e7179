package env

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// hear listens to the echo requests that reach this machine until ctx ends. What it
// returns says from which addresses some have come so far: the kernel keeps them
// until somebody asks.
func hear(ctx context.Context) (func() []netip.Addr, error) {
	conn, err := net.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return nil, fmt.Errorf("listen to echo requests: %w", err)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	var mu sync.Mutex // guards all
	var all []netip.Addr
	return func() []netip.Addr {
		mu.Lock()
		defer mu.Unlock()
		packet := make([]byte, 64) // its own header, and what the IP header takes while it is read
		for conn.SetReadDeadline(time.Now().Add(time.Millisecond)) == nil {
			_, from, err := conn.ReadFrom(packet)
			if err != nil {
				break // there are no more
			}
			const echoRequest = 8
			a, ok := netip.AddrFromSlice(from.(*net.IPAddr).IP)
			if ok && packet[0] == echoRequest && !slices.Contains(all, a.Unmap()) {
				all = append(all, a.Unmap())
			}
		}
		return slices.Clone(all)
	}, nil
}
