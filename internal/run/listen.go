package run

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// How long what is in use is tried again.
const (
	patience = 5 * time.Second
	pause    = 20 * time.Millisecond
)

// Patiently calls open again for a while, as long as its error is busy. It is for
// who follows a killed process: a child that it was about to start has its
// sockets and locks until it has called exec, and may outlive it by a moment.
func Patiently(ctx context.Context, busy error, open func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := open()
		if !errors.Is(err, busy) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// Listen is net.Listen for who follows a killed process.
func Listen(ctx context.Context, c net.ListenConfig, network, address string) (l net.Listener, err error) {
	err = Patiently(ctx, unix.EADDRINUSE, func() error {
		l, err = c.Listen(ctx, network, address)
		return err
	})
	return l, err
}
