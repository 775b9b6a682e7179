package rpc

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/run"
	"ingot/internal/wire"
)

// patient answers nobody for as long as they wait.
type patient struct {
	ingotv1.UnimplementedHostServer
	v1alpha1.UnimplementedMicroVMServer
	began chan struct{}
}

func (p *patient) wait(ctx context.Context) error {
	select {
	case p.began <- struct{}{}:
		<-ctx.Done()
	case <-ctx.Done():
	}
	return context.Cause(ctx)
}

func (p *patient) Facts(ctx context.Context, _ *emptypb.Empty) (*ingotv1.HostFacts, error) {
	return nil, p.wait(ctx)
}

func (p *patient) CreateMicroVM(ctx context.Context, _ *v1alpha1.CreateMicroVMRequest) (*v1alpha1.CreateMicroVMResponse, error) {
	return nil, p.wait(ctx)
}

func (p *patient) Watch(_ *ingotv1.WatchRequest, s grpc.ServerStreamingServer[ingotv1.WatchResponse]) error {
	return p.wait(s.Context())
}

// TestBound: what is above a bound is refused with what to do, also to who comes by
// another connection; another address has a share of its own, and an end makes room.
func TestBound(t *testing.T) {
	p := &patient{began: make(chan struct{})}
	b := bound{creates: run.NewQuota(3, 2), calls: run.NewQuota(3, 2), streams: run.NewQuota(3, 2)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(append(wire.ServerOptions("", slog.New(slog.DiscardHandler)), b.options()...)...)
	ingotv1.RegisterHostServer(g, p)
	v1alpha1.RegisterMicroVMServer(g, p)
	var serving sync.WaitGroup
	serving.Go(func() { g.Serve(l) })
	t.Cleanup(func() { g.Stop(); serving.Wait() })
	dial := func(from string) *grpc.ClientConn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return d.DialContext(ctx, "tcp", to) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	one, again, other, third := dial("127.0.0.1"), dial("127.0.0.1"), dial("127.0.0.2"), dial("127.0.0.3")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for kind, call := range map[string]func(ctx context.Context, c *grpc.ClientConn) error{
		"creates": func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := v1alpha1.NewMicroVMClient(c).CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{})
			return err
		},
		"calls": func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := ingotv1.NewHostClient(c).Facts(ctx, &emptypb.Empty{})
			return err
		},
		"watches": func(ctx context.Context, c *grpc.ClientConn) error {
			s, err := ingotv1.NewHostClient(c).Watch(ctx, &ingotv1.WatchRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
	} {
		t.Run(kind, func(t *testing.T) {
			held, end := context.WithCancel(ctx)
			var busy sync.WaitGroup
			hold := func(c *grpc.ClientConn) {
				busy.Go(func() { call(held, c) })
				<-p.began
			}
			full := func(c *grpc.ClientConn) {
				t.Helper()
				if err := call(ctx, c); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), kind) || !strings.Contains(err.Error(), "try again") {
					t.Errorf("one too many: %v", err)
				}
			}
			hold(one)
			hold(again)
			full(one)
			hold(other)
			full(third)
			end()
			busy.Wait()
			// The server hears of an end a little later than the client.
			for err = error(status.Error(codes.ResourceExhausted, "")); status.Code(err) == codes.ResourceExhausted && ctx.Err() == nil; {
				short, stop := context.WithTimeout(ctx, 5*time.Second)
				var begun sync.WaitGroup
				begun.Go(func() {
					select {
					case <-p.began:
						stop()
					case <-short.Done():
					}
				})
				err = call(short, third)
				stop()
				begun.Wait()
			}
			if status.Code(err) != codes.Canceled {
				t.Errorf("when there is room again: %v", err)
			}
		})
	}
	large := metadata.AppendToOutgoingContext(ctx, "x-large", strings.Repeat("x", 2*mostHeader))
	if _, err := ingotv1.NewHostClient(third).Facts(large, &emptypb.Empty{}); status.Code(err) != codes.Internal {
		t.Errorf("a header of 128 KiB: %v", err)
	}
}
