// Package rpc serves a host over gRPC: flintlock's services and ingot.v1's Host, on one
// listener; flintlock's alone on another, in plaintext, where that is wanted; and
// flintlock's MicroVM over HTTP, on a third. It keeps nothing and decides nothing.
package rpc

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	execv1 "ingot/api/services/microvmexec/v1alpha1"
	sshv1 "ingot/api/services/microvmsshproxy/v1alpha1"
	"ingot/internal/host"
	"ingot/internal/image"
	"ingot/internal/pki"
	"ingot/internal/run"
	"ingot/internal/wire"
)

// Config is all that the services need.
type Config struct {
	Listen     string
	TLS        *tls.Config // nil: plaintext, by choice
	Plain      string      // where flintlock's services are served in plaintext as well; empty: nowhere
	Token      pki.Secret  // empty: anybody, by choice
	Host       *host.Host
	Images     *image.Store
	Pool       string // where volumes live
	Segment    string // the interface whose address is the host's
	Version    string
	Revision   string // and when it was made; empty: not known
	BuildDate  string
	ConfigFile string
	StateDir   string
	Log        *slog.Logger

	ExecAPI     bool   // serve MicroVMExec
	SSHProxyAPI bool   // serve MicroVMSSHProxy
	Advertise   string // where clients reach Listen; empty: where they came

	// What calls pass first, which sees the codes of errors; nil: nothing.
	Unary  grpc.UnaryServerInterceptor
	Stream grpc.StreamServerInterceptor
}

func (c Config) unary(ctx context.Context, r any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if c.Unary == nil {
		return next(ctx, r)
	}
	return c.Unary(ctx, r, info, next)
}

func (c Config) stream(service any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if c.Stream == nil {
		return next(service, s)
	}
	return c.Stream(service, s, info, next)
}

// Server serves one host.
type Server struct {
	c     Config
	ready chan struct{}
	own   *hostService
	calls calls
	bound bound

	register func(*grpc.Server) // what flintlock's clients call

	doors []door // from ready on
}

// door is a listener and what is served on it.
type door struct {
	listener net.Listener
	server   *grpc.Server
	health   *health.Server
	tls      bool
}

// New makes a server.
func New(c Config) *Server {
	s := &Server{c: c, ready: make(chan struct{}), own: &hostService{Config: c}, bound: newBound()}
	s.register = s.flintlock
	return s
}

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "grpc api" }

// drainTime is how long calls under way may take to end when the server does.
const drainTime = 8 * time.Second

// Run serves until ctx ends, and then lets calls under way end, but no streams.
func (s *Server) Run(ctx context.Context) error {
	if s.c.Token == "" {
		s.c.Log.Warn("basic authentication is DISABLED")
	}
	if err := s.open(ctx); err != nil {
		for _, d := range s.doors {
			d.listener.Close()
		}
		return err
	}
	defer s.own.receivers.Wait()
	close(s.ready)
	group, ctx := errgroup.WithContext(ctx)
	for _, d := range s.doors {
		group.Go(func() error {
			if err := d.server.Serve(d.listener); err != nil && ctx.Err() == nil {
				return fmt.Errorf("serve gRPC on %s: %w", d.listener.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error {
		select {
		case <-s.c.Host.Ready():
			s.c.Images.Follow(ctx, s.setHealth) // without containerd nothing can be made
		case <-ctx.Done():
		}
		s.drain(context.WithoutCancel(ctx))
		return nil
	})
	return group.Wait()
}

// open begins to listen.
func (s *Server) open(ctx context.Context) error {
	err := s.add(ctx, s.c.Listen, s.c.TLS, func(g *grpc.Server) {
		s.register(g)
		ingotv1.RegisterHostServer(g, s.own)
	})
	if err == nil && s.c.Plain != "" {
		err = s.add(ctx, s.c.Plain, nil, s.register)
	}
	return err
}

// add begins to listen on one address. No security is plaintext.
func (s *Server) add(ctx context.Context, address string, security *tls.Config, register func(*grpc.Server)) error {
	options := []grpc.ServerOption{grpc.ChainUnaryInterceptor(s.c.unary), grpc.ChainStreamInterceptor(s.c.stream)}
	options = append(options, wire.ServerOptions(s.c.Token, s.c.Log)...)
	options = append(options, grpc.WaitForHandlers(true), grpc.ChainUnaryInterceptor(s.calls.count))
	options = append(options, s.bound.options()...)
	switch {
	case security != nil:
		options = append(options, grpc.Creds(wire.TLS(security, s.c.Log)))
	case address == s.c.Listen:
		s.c.Log.Warn("TLS is DISABLED")
	default:
		s.c.Log.Warn("TLS is DISABLED", "endpoint", address)
	}
	d := door{server: grpc.NewServer(options...), health: health.NewServer(), tls: security != nil}
	register(d.server)
	grpc_health_v1.RegisterHealthServer(d.server, d.health)
	reflection.Register(d.server)
	var err error
	if d.listener, err = run.Listen(ctx, net.ListenConfig{}, "tcp", address); err != nil {
		return fmt.Errorf("serve gRPC on %s: %w", address, err)
	}
	s.doors = append(s.doors, d)
	s.setHealth(false)
	s.c.Log.Debug("starting grpc server listening on endpoint " + address)
	return nil
}

// setHealth is what health checks are told, of each service and of all.
func (s *Server) setHealth(serving bool) {
	now := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		now = grpc_health_v1.HealthCheckResponse_SERVING
	}
	for _, d := range s.doors {
		d.health.SetServingStatus("", now)
		for name := range d.server.GetServiceInfo() {
			d.health.SetServingStatus(name, now)
		}
	}
}

// flintlock registers what flintlock's clients call.
func (s *Server) flintlock(g *grpc.Server) {
	v1alpha1.RegisterMicroVMServer(g, &microVM{Config: s.c})
	if s.c.ExecAPI {
		execv1.RegisterMicroVMExecServer(g, &microVMExec{hostService: s.own})
	}
	if s.c.SSHProxyAPI {
		sshv1.RegisterMicroVMSSHProxyServer(g, &microVMSSHProxy{hostService: s.own, port: sshPort})
	}
}

// lastAnswer is how long the answers of calls that have ended may take to leave.
const lastAnswer = 200 * time.Millisecond

// drain ends the servers: calls when they are done, and then streams, which do not end
// by themselves.
func (s *Server) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	s.setHealth(false)
	var graceful, forced sync.WaitGroup
	for _, d := range s.doors {
		graceful.Go(d.server.GracefulStop) // it takes no more calls
	}
	forced.Go(func() {
		if n := s.calls.wait(ctx); n > 0 {
			s.c.Log.Warn("calls under way are given up", "calls", n)
		}
		select {
		case <-time.After(lastAnswer):
		case <-ctx.Done():
		}
		for _, d := range s.doors {
			d.server.Stop()
		}
	})
	graceful.Wait()
	cancel()
	forced.Wait()
}

// calls counts those under way that have one answer.
type calls struct {
	mu   sync.Mutex // guards what follows
	n    int
	none chan struct{} // somebody waits until there are none
}

func (c *calls) count(ctx context.Context, r any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	c.add(1)
	defer c.add(-1)
	return next(ctx, r)
}

func (c *calls) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n += n; c.n == 0 && c.none != nil {
		close(c.none)
		c.none = nil
	}
}

// wait returns when there are none, or ctx ends, and says how many are left.
func (c *calls) wait(ctx context.Context) int {
	c.mu.Lock()
	none := make(chan struct{})
	if c.n == 0 {
		close(none)
	} else {
		c.none = none
	}
	c.mu.Unlock()
	select {
	case <-none:
		return 0
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// Alive looks whether the host answers, which it may do for ever if it does not, and
// whether gRPC does.
func (s *Server) Alive(ctx context.Context) error {
	s.c.Host.List("", "")
	for _, d := range s.doors {
		if err := d.alive(ctx); err != nil {
			return fmt.Errorf("ask gRPC on %s: %w", d.listener.Addr(), err)
		}
	}
	return nil
}

// alive hears the first that a server says to whom it does not know yet.
func (d door) alive(ctx context.Context) error {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", d.listener.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if d.tls { // whether the certificate is right is its clients' business
		return tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).HandshakeContext(ctx)
	}
	_, err = io.ReadFull(c, make([]byte, 1)) // of the settings of HTTP/2
	return err
}
