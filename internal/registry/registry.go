// Package registry is the environment's own OCI registry: anyone may pull,
// only who knows the password may push or delete. It owns the directory that
// the blobs are in and the TLS listener. It mirrors nothing, and keeps no users.
package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	"github.com/sirupsen/logrus"

	"ingot/internal/run"
)

// Config is all that a registry needs.
type Config struct {
	Dir      string // where blobs and manifests are kept
	Listen   string // host:port
	CertFile string // read again for each new connection, so that a renewed one is used at once
	KeyFile  string
	User     string // who may write; empty: nobody
	Password string
	Log      *slog.Logger

	// Stall is how long a client may take for the next piece of what it reads or
	// writes, so that no slow one keeps what others need. 0: a minute.
	Stall time.Duration
}

// Each connection has a descriptor, and each request has one of a blob. A host
// that brings up many microVMs has some of both for each.
const (
	maxConns, maxConnsEach       = 512, 128
	maxRequests, maxRequestsEach = 1024, 256
)

// Server is a registry.
type Server struct {
	c        Config
	ready    chan struct{}
	requests *run.Quota
}

// New makes a registry over a directory, which need not exist yet.
func New(c Config) (*Server, error) {
	if c.Dir == "" || c.Listen == "" || c.CertFile == "" || c.KeyFile == "" {
		return nil, fmt.Errorf("make registry: directory, address, certificate and key are needed: %w", errdefs.ErrInvalidArgument)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Stall = cmp.Or(c.Stall, time.Minute)
	return &Server{c: c, ready: make(chan struct{}), requests: run.NewQuota(maxRequests, maxRequestsEach)}, nil
}

// Ready is closed when the registry listens.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "registry" }

// Run serves until ctx ends, then lets requests under way finish for a moment.
func (s *Server) Run(ctx context.Context) error {
	if _, err := s.certificate(nil); err != nil {
		return fmt.Errorf("serve registry: %w", err)
	}
	// distribution reports every question for a blob that is not there as an error, which
	// each push begins with, to the one global logrus. What matters to an
	// operator comes from answer.
	logrus.SetLevel(logrus.FatalLevel)
	if err := s.clean(ctx); err != nil {
		s.c.Log.Warn("remove what deleted images and a killed registry have left", "err", err)
	}
	listener, err := run.Listen(ctx, net.ListenConfig{}, "tcp", s.c.Listen)
	if err != nil {
		return fmt.Errorf("serve registry: %w", err)
	}
	listener = run.Limit(listener, run.NewQuota(maxConns, maxConnsEach))
	app := handlers.NewApp(ctx, s.distribution())
	defer app.Shutdown()
	server := &http.Server{
		Handler:           s.guard(app),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate},
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		HTTP2:             &http.HTTP2Config{WriteByteTimeout: s.c.Stall},
		ErrorLog:          slog.NewLogLogger(s.c.Log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(listener, "", "") }()
	close(s.ready)
	select {
	case err := <-served:
		return fmt.Errorf("serve registry: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve registry: %w", err)
	}
	return nil
}

func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(s.c.CertFile, s.c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("load certificate: %w", err)
	}
	return &c, nil
}

// guard lets everyone read, and only the one user write.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &answer{ResponseWriter: w, control: http.NewResponseController(w), stall: s.c.Stall}
		w = a
		a.writing()
		defer a.writing() // of what is left in buffers
		if r.Body != http.NoBody {
			a.reading()
			r.Body = &body{r.Body, a}
		}
		switch r.Method {
		case http.MethodGet, http.MethodHead:
		default:
			if !s.mayWrite(r) {
				w.Header().Set("WWW-Authenticate", `Basic realm="ingot"`)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusUnauthorized)
				io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"writing needs the environment's credentials"}]}`)
				return
			}
		}
		from, _ := netip.ParseAddrPort(r.RemoteAddr)
		give, ok := s.requests.Take(net.TCPAddrFromAddrPort(from))
		if !ok {
			http.Error(a, "too many requests at one time", http.StatusServiceUnavailable)
			return
		}
		defer give()
		next.ServeHTTP(a, r)
		level := slog.LevelDebug
		if a.status >= http.StatusInternalServerError {
			level = slog.LevelWarn
		}
		s.c.Log.Log(r.Context(), level, "registry request", "method", r.Method, "path", r.URL.Path, "status", a.status, "from", r.RemoteAddr)
	})
}

// answer remembers the status of a response, and wants progress of the client.
type answer struct {
	http.ResponseWriter
	status  int
	control *http.ResponseController
	stall   time.Duration
}

func (a *answer) reading() { a.control.SetReadDeadline(time.Now().Add(a.stall)) }

func (a *answer) writing() { a.control.SetWriteDeadline(time.Now().Add(a.stall)) }

func (a *answer) WriteHeader(status int) {
	a.status = status
	a.writing()
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.writing()
	return a.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController find what the response can do.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// body is a request's. At its end the server looks whether the client goes away,
// which has no deadline: the handler may be busy with what came.
type body struct {
	io.ReadCloser
	a *answer
}

func (b *body) Read(p []byte) (int, error) {
	b.a.reading()
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.a.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

func (s *Server) mayWrite(r *http.Request) bool {
	user, password, ok := r.BasicAuth()
	if !ok || s.c.User == "" || s.c.Password == "" {
		return false
	}
	return equal(user, s.c.User)&equal(password, s.c.Password) == 1
}

// equal takes the same time whatever the lengths and the first difference.
func equal(a, b string) int {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:])
}

// distribution is the configuration of distribution's handlers.
func (s *Server) distribution() *configuration.Configuration {
	secret := make([]byte, 32)
	rand.Read(secret)
	c := &configuration.Configuration{
		Version: "0.1",
		Storage: configuration.Storage{
			"filesystem": configuration.Parameters{"rootdirectory": s.c.Dir},
			"delete":     configuration.Parameters{"enabled": true},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{
				"enabled": true, "age": "24h", "interval": "24h", "dryrun": false,
			}},
		},
	}
	c.Log.AccessLog.Disabled = true
	c.Log.Level = "error"
	c.HTTP.Secret = hex.EncodeToString(secret) // signs upload URLs; a restart only breaks uploads under way
	c.HTTP.RelativeURLs = true
	c.Catalog.MaxEntries = 1000 // a page; 0 would refuse every listing
	return c
}
