package image

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
)

// restartTime is how long a containerd that has gone is waited for before a
// request that needs it fails: longer than its restart takes.
const restartTime = 5 * time.Second

func (s *Store) connect(ctx context.Context) error {
	cl, err := client.New(s.c.Socket, client.WithDefaultNamespace(s.c.Namespace), client.WithDialOpts([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket
		grpc.WithContextDialer(dialer.ContextDialer),
		// containerd's own client waits up to 10 s between two tries.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second},
			MinConnectTimeout: restartTime,
		}),
	}))
	if err != nil {
		return err
	}
	s.client, s.conn = cl, cl.Conn().(*grpc.ClientConn)
	if err := s.wait(ctx); err != nil {
		cl.Close()
		return err
	}
	return nil
}

// wait returns when containerd serves.
func (s *Store) wait(ctx context.Context) error {
	serving, err := s.client.IsServing(ctx)
	if err == nil && !serving {
		return errdefs.ErrUnavailable
	}
	return err
}

// reconnect waits for a containerd that was restarted. With a connection that
// is up it costs nothing.
func (s *Store) reconnect(ctx context.Context) error {
	if s.conn.GetState() == connectivity.Ready {
		return nil
	}
	s.conn.ResetConnectBackoff()
	short, cancel := context.WithTimeout(ctx, restartTime)
	defer cancel()
	if err := s.wait(short); err != nil {
		if ctx.Err() == nil {
			return errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("containerd does not answer at %s: %v", s.c.Socket, err))
		}
		return err
	}
	return nil
}
