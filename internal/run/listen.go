package run

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// How long an address that is in use is tried again.
const (
	listenPatience = 5 * time.Second
	listenPause    = 20 * time.Millisecond
)

// Listen is net.Listen for who follows a killed process: a child that it was
// about to start has its sockets until it has called exec, and may outlive it by
// a moment.
func Listen(ctx context.Context, c net.ListenConfig, network, address string) (net.Listener, error) {
	deadline := time.Now().Add(listenPatience)
	for {
		l, err := c.Listen(ctx, network, address)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(listenPause):
		}
	}
}
