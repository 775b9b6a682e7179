package image

import (
	"context"
	"fmt"
	"sync"
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

// How often containerd is asked whether it is there, while something of it is waited
// for, and how long it may take to say so: it does even when its disks are at work.
const (
	watchEvery = 2 * time.Second
	silence    = 10 * time.Second
)

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

// reconnect waits for a containerd that was restarted, or hung. With a connection that
// is up it costs nothing.
func (s *Store) reconnect(ctx context.Context) error {
	if s.conn.GetState() == connectivity.Ready && !s.silent.Load() {
		return nil
	}
	s.conn.ResetConnectBackoff()
	short, cancel := context.WithTimeout(ctx, restartTime)
	defer cancel()
	if err := s.wait(short); err != nil {
		if ctx.Err() == nil {
			return s.noAnswer(err)
		}
		return err
	}
	s.setSilent(false)
	return nil
}

func (s *Store) setSilent(silent bool) {
	if s.silent.Swap(silent) == silent {
		return
	}
	select {
	case s.turned <- struct{}{}:
	default:
	}
}

// Follow tells whether containerd answers, at first and whenever that changes, until ctx
// ends. Its restart is no change. That it hangs is known once something is asked of it.
func (s *Store) Follow(ctx context.Context, tell func(answers bool)) {
	told := false
	for last := false; ctx.Err() == nil; {
		connected := s.steady(ctx)
		hangs := s.silent.Load()
		if answers := connected && !hangs; ctx.Err() == nil && (answers != last || !told) {
			tell(answers)
			last, told = answers, true
		}
		switch {
		case hangs && connected: // where it is not served nobody may ask
			select {
			case <-time.After(watchEvery):
				_ = s.reconnect(ctx) // which finds whether it still hangs
			case <-ctx.Done():
			}
		case connected:
			s.change(ctx)
		}
	}
}

// steady says whether there is a connection, or is one within restartTime.
func (s *Store) steady(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, restartTime)
	defer cancel()
	for {
		state := s.conn.GetState()
		if state == connectivity.Ready {
			return true
		}
		s.conn.Connect() // it may be idle
		if !s.conn.WaitForStateChange(ctx, state) {
			return false
		}
	}
}

// change returns when a connection that was there is not, or containerd hangs, or ctx
// ends.
func (s *Store) change(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var turned sync.WaitGroup
	defer turned.Wait()
	defer cancel()
	turned.Go(func() {
		select {
		case <-s.turned:
			cancel()
		case <-ctx.Done():
		}
	})
	s.conn.WaitForStateChange(ctx, connectivity.Ready)
}

func (s *Store) noAnswer(err error) error {
	return errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("containerd does not answer at %s: %v", s.c.Socket, err))
}

// answering does what needs containerd, for as long as that answers. One that hangs
// keeps its connection: what it is asked for would be waited for without end.
func (s *Store) answering(ctx context.Context, do func(context.Context) error) error {
	if err := s.reconnect(ctx); err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() {
		if err := s.watch(ctx); err != nil {
			s.setSilent(true)
			end(err)
		}
	})
	err := do(ctx)
	if cause := context.Cause(ctx); err != nil && errdefs.IsUnavailable(cause) {
		err = cause
	}
	end(nil)
	return err
}

// watch asks containerd again and again, until it does not answer, or ctx ends.
func (s *Store) watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		short, cancel := context.WithTimeout(ctx, silence)
		err := s.wait(short)
		cancel()
		if err != nil && ctx.Err() == nil {
			return s.noAnswer(err)
		}
	}
}
