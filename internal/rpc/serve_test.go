package rpc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/host"
	"ingot/internal/need"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// running is a server with a host that nobody runs.
type running struct {
	*Server
	log   *safeBuffer
	files pki.Files // of a client
	stop  context.CancelFunc
	ended chan error
}

// count is how often something is in the log.
func (r *running) count(text string) int { return strings.Count(r.log.String(), text) }

// start starts a server, of something else in the place of flintlock's services, if that
// is given.
func start(t *testing.T, c Config, instead v1alpha1.MicroVMServer) *running {
	t.Helper()
	log := &safeBuffer{}
	c.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.Host = host.New(host.Config{StateDir: t.TempDir(), Log: c.Log})
	s := New(c)
	if instead != nil {
		s.register = func(g *grpc.Server) { v1alpha1.RegisterMicroVMServer(g, instead) }
	}
	r := &running{Server: s, log: log, ended: make(chan error, 1)}
	ctx, stop := context.WithCancel(t.Context())
	r.stop = stop
	go func() { r.ended <- s.Run(ctx); close(r.ended) }()
	t.Cleanup(func() { stop(); <-r.ended })
	select {
	case <-s.Ready():
	case err := <-r.ended:
		t.Fatal(err)
	}
	return r
}

// withTLS is a server that has TLS on one listener and plaintext on another.
func withTLS(t *testing.T) *running {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.OpenCA(filepath.Join(dir, "ca"), "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "client"} {
		if _, err := ca.Ensure(filepath.Join(dir, name), name, nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")}); err != nil {
			t.Fatal(err)
		}
	}
	shown, err := pki.In(filepath.Join(dir, "server")).Open(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{Listen: "127.0.0.1:0", Plain: "localhost:0", TLS: shown.Config(), Token: "secret"}, nil)
	s.files = pki.In(filepath.Join(dir, "client"))
	return s
}

func (r *running) dial(t *testing.T, target wire.Target) *grpc.ClientConn {
	t.Helper()
	c, err := wire.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// serving are the services that a server's reflection names.
func serving(t *testing.T, c *grpc.ClientConn) (string, error) {
	t.Helper()
	stream, err := grpc_reflection_v1.NewServerReflectionClient(c).ServerReflectionInfo(soon(t))
	if err == nil {
		err = stream.Send(&grpc_reflection_v1.ServerReflectionRequest{
			MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
		})
	}
	if err != nil && !errors.Is(err, io.EOF) { // then Recv says why
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	return answer.GetListServicesResponse().String(), err
}

// TestPlainEndpoint: what is served in plaintext is flintlock's, to who has the token.
func TestPlainEndpoint(t *testing.T) {
	s := withTLS(t)
	for _, c := range []struct {
		name   string
		target wire.Target
		own    codes.Code // of a call of ours
	}{
		{"TLS", wire.Target{Address: s.doors[0].listener.Addr().String(), TLS: s.files}, codes.OK},
		{"plaintext", wire.Target{Address: s.doors[1].listener.Addr().String(), Insecure: true}, codes.Unimplemented},
	} {
		stranger := s.dial(t, c.target)
		c.target.Token = "secret"
		conn := s.dial(t, c.target)
		for conn, want := range map[*grpc.ClientConn]codes.Code{stranger: codes.Unauthenticated, conn: codes.OK} {
			_, err := v1alpha1.NewMicroVMClient(conn).ListMicroVMs(soon(t), &v1alpha1.ListMicroVMsRequest{})
			if status.Code(err) != want {
				t.Errorf("%s: %v, want %v", c.name, err, want)
			}
			_, err = grpc_health_v1.NewHealthClient(conn).Check(soon(t), &grpc_health_v1.HealthCheckRequest{})
			if status.Code(err) != want {
				t.Errorf("%s: health: %v, want %v", c.name, err, want)
			}
			if _, err := serving(t, conn); status.Code(err) != want {
				t.Errorf("%s: reflection: %v, want %v", c.name, err, want)
			}
		}
		_, err := ingotv1.NewHostClient(conn).List(soon(t), &ingotv1.ListRequest{})
		if status.Code(err) != c.own {
			t.Errorf("%s: a call of ours: %v, want %v", c.name, err, c.own)
		}
		services, _ := serving(t, conn)
		if !strings.Contains(services, "microvm.services.api.v1alpha1.MicroVM") || strings.Contains(services, "ingot.v1.Host") != (c.own == codes.OK) {
			t.Errorf("%s: reflection names %s", c.name, services)
		}
	}
	if s.count(`"TLS is DISABLED"`) != 1 || s.count("basic authentication") != 0 {
		t.Errorf("log: %s", s.log.String())
	}
}

// TestPlaintextToTLS: a client without TLS is told of once, however often it comes.
func TestPlaintextToTLS(t *testing.T) {
	s := withTLS(t)
	conn := s.dial(t, wire.Target{Address: s.doors[0].listener.Addr().String(), Insecure: true})
	for range 3 {
		conn.ResetConnectBackoff()
		if _, err := v1alpha1.NewMicroVMClient(conn).ListMicroVMs(soon(t), &v1alpha1.ListMicroVMsRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); s.count("from=127.0.0.1") == 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond) // the client may hear of it first
	}
	if n := s.count("a client speaks plaintext"); n != 1 || s.count("from=127.0.0.1") != 1 {
		t.Errorf("%d lines: %s", n, s.log.String())
	}
}

// TestHealthOfHost: a host that does not know its microVMs yet does not serve.
func TestHealthOfHost(t *testing.T) {
	s := withTLS(t)
	conn := s.dial(t, wire.Target{Address: s.doors[1].listener.Addr().String(), Insecure: true, Token: "secret"})
	for service, want := range map[string]codes.Code{"": codes.OK, "microvm.services.api.v1alpha1.MicroVM": codes.OK, "ingot.v1.Host": codes.NotFound} {
		r, err := grpc_health_v1.NewHealthClient(conn).Check(soon(t), &grpc_health_v1.HealthCheckRequest{Service: service})
		if status.Code(err) != want || err == nil && r.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			t.Errorf("%q: %v, %v", service, r, err)
		}
	}
}

func TestAlive(t *testing.T) {
	s := withTLS(t)
	if err := s.Alive(soon(t)); err != nil {
		t.Error(err)
	}
	// Somebody accepts, and says nothing.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, d := range []door{{listener: l}, {listener: l, tls: true}} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if err := d.alive(ctx); err == nil {
			t.Error("who says nothing is alive")
		}
		cancel()
	}
	s.stop()
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
	if err := s.Alive(soon(t)); err == nil {
		t.Error("a server that has ended is alive")
	}
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := New(Config{Listen: "127.0.0.1:0", Plain: l.Addr().String(), Log: slog.New(slog.DiscardHandler)})
	if err := s.Run(soon(t)); err == nil || !strings.Contains(err.Error(), "serve gRPC on "+l.Addr().String()) || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("got %v", err)
	}
	c, err := net.Dial("tcp", s.doors[0].listener.Addr().String())
	if err == nil {
		c.Close()
		t.Error("the other address is listened on")
	}
}

// slow has a call and a stream that last until they are let go.
type slow struct {
	v1alpha1.UnimplementedMicroVMServer
	begun chan string
	let   chan struct{}
}

func (s slow) DeleteMicroVM(ctx context.Context, _ *v1alpha1.DeleteMicroVMRequest) (*emptypb.Empty, error) {
	s.begun <- "call"
	select {
	case <-s.let:
		return &emptypb.Empty{}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (s slow) ListMicroVMsStream(_ *v1alpha1.ListMicroVMsRequest, stream v1alpha1.MicroVM_ListMicroVMsStreamServer) error {
	s.begun <- "stream"
	<-stream.Context().Done()
	return context.Cause(stream.Context())
}

// TestDrain: a server that is to end takes nothing new, and lets a call end, not a
// stream.
func TestDrain(t *testing.T) {
	work := slow{begun: make(chan string, 2), let: make(chan struct{})}
	s := start(t, Config{Listen: "127.0.0.1:0"}, work)
	address := s.doors[0].listener.Addr().String()
	client := v1alpha1.NewMicroVMClient(s.dial(t, wire.Target{Address: address, Insecure: true}))
	stream, err := client.ListMicroVMsStream(soon(t), &v1alpha1.ListMicroVMsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	<-work.begun
	called := make(chan error, 1)
	go func() {
		_, err := client.DeleteMicroVM(soon(t), &v1alpha1.DeleteMicroVMRequest{})
		called <- err
	}()
	<-work.begun
	s.stop()
	for { // until nobody listens any more
		c, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		c.Close()
		time.Sleep(5 * time.Millisecond)
	}
	select {
	case err := <-called:
		t.Fatalf("the call ended before it was done: %v", err)
	case err := <-s.ended:
		t.Fatalf("the server ended before the call: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	close(work.let)
	if err := <-called; err != nil {
		t.Errorf("the call: %v", err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream: %v", err)
	}
	if err := <-s.ended; err != nil {
		t.Errorf("the server: %v", err)
	}
}

// TestDrainIsBounded: a call that does not end does not keep the server.
func TestDrainIsBounded(t *testing.T) {
	need.Time(t)
	work := slow{begun: make(chan string, 2)}
	s := start(t, Config{Listen: "127.0.0.1:0"}, work)
	// And somebody who never says anything.
	silent, err := net.Dial("tcp", s.doors[0].listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	client := v1alpha1.NewMicroVMClient(s.dial(t, wire.Target{Address: s.doors[0].listener.Addr().String(), Insecure: true}))
	called := make(chan error, 1)
	go func() {
		_, err := client.DeleteMicroVM(soon(t), &v1alpha1.DeleteMicroVMRequest{})
		called <- err
	}()
	<-work.begun
	began := time.Now()
	s.stop()
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < drainTime || took > drainTime+2*time.Second {
		t.Errorf("it took %v", took)
	}
	if err := <-called; status.Code(err) != codes.Unavailable {
		t.Errorf("the call: %v", err)
	}
	if s.count("calls under way are given up") != 1 {
		t.Errorf("log: %s", s.log.String())
	}
}
