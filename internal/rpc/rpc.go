// Package rpc serves a host over gRPC: flintlock's services and ingot.v1's Host, on one
// listener; and flintlock's MicroVM over HTTP, on another. It keeps nothing and decides
// nothing.
package rpc

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
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
}

// Server serves one host.
type Server struct {
	c     Config
	ready chan struct{}
}

// New makes a server.
func New(c Config) *Server { return &Server{c: c, ready: make(chan struct{})} }

// Ready is closed once the server listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "grpc api" }

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	s.c.Log.Info("flintlockd grpc api server starting")
	options := append(wire.ServerOptions(s.c.Token, s.c.Log), grpc.WaitForHandlers(true))
	if s.c.Token == "" {
		s.c.Log.Warn("basic authentication is DISABLED")
	}
	if s.c.TLS == nil {
		s.c.Log.Warn("TLS is DISABLED")
	} else {
		options = append(options, grpc.Creds(credentials.NewTLS(s.c.TLS)))
	}
	g := grpc.NewServer(options...)
	v1alpha1.RegisterMicroVMServer(g, &microVM{Config: s.c})
	h := &hostService{Config: s.c}
	ingotv1.RegisterHostServer(g, h)
	if s.c.ExecAPI {
		execv1.RegisterMicroVMExecServer(g, &microVMExec{hostService: h})
	}
	if s.c.SSHProxyAPI {
		sshv1.RegisterMicroVMSSHProxyServer(g, &microVMSSHProxy{hostService: h, port: sshPort})
	}
	grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	reflection.Register(g)
	l, err := run.Listen(ctx, net.ListenConfig{}, "tcp", s.c.Listen)
	if err != nil {
		return fmt.Errorf("serve gRPC on %s: %w", s.c.Listen, err)
	}
	s.c.Log.Debug("starting grpc server listening on endpoint " + s.c.Listen)
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	close(s.ready)
	defer h.receivers.Wait()
	if err := g.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve gRPC: %w", err)
	}
	return nil
}
