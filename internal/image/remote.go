package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// patience is how long a registry may be silent, or slow, before it counts as
// unreachable.
type patience struct {
	connect time.Duration // to accept a connection
	answer  time.Duration // to begin an answer
	stall   time.Duration // to go on with one
	slow    time.Duration // and in which it brings slowest at least
}

var usualPatience = patience{connect: 10 * time.Second, answer: 30 * time.Second, stall: 60 * time.Second, slow: 60 * time.Second}

// slowest is what a line brings that is of any use: 1 KiB in a second.
const slowest = 60 << 10

// transport is made anew for each pull: a certificate that was renewed is seen,
// and a registry that hangs holds nothing that another needs.
func (s *Store) transport() (*http.Transport, error) {
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if s.c.CAFile != "" {
		pem, err := os.ReadFile(s.c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the registry's CA: %w", err)
		}
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read the registry's CA: no certificate in %s: %w", s.c.CAFile, errdefs.ErrFailedPrecondition)
		}
	}
	dialer := &net.Dialer{Timeout: s.patience.connect}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return stallConn{conn, s.patience.stall}, nil
		},
		TLSClientConfig:       &tls.Config{RootCAs: roots},
		TLSHandshakeTimeout:   s.patience.connect,
		ResponseHeaderTimeout: s.patience.answer,
		MaxIdleConnsPerHost:   8,
		ForceAttemptHTTP2:     true,
	}, nil
}

// stallConn fails a read that brings nothing for too long. A limit for a whole
// request would fail large layers on slow lines.
type stallConn struct {
	net.Conn
	stall time.Duration
}

func (c stallConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// paced fails answers that come, but so slowly that they would never end.
type paced struct {
	http.RoundTripper
	slow time.Duration
}

func (p paced) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := p.RoundTripper.RoundTrip(r)
	if err == nil {
		answer.Body = &pacedBody{ReadCloser: answer.Body, slow: p.slow}
	}
	return answer, err
}

// pacedBody counts the time that is waited for the registry, not for containerd.
type pacedBody struct {
	io.ReadCloser
	slow   time.Duration
	waited time.Duration
	bytes  int
}

func (b *pacedBody) Read(p []byte) (int, error) {
	began := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.waited += time.Since(began)
	b.bytes += n
	if b.waited < b.slow {
		return n, err
	}
	if err == nil && b.bytes < slowest {
		err = fmt.Errorf("the registry is too slow: %d bytes in %s: %w", b.bytes, b.waited.Round(time.Second), errdefs.ErrUnavailable)
	}
	b.waited, b.bytes = 0, 0
	return n, err
}

// resolver speaks to registries by TLS; only another registry on this very
// machine may do without, as for all of containerd's clients.
func (s *Store) resolver(t *http.Transport, count func(int64)) (remotes.Resolver, error) {
	known, err := readCredentials(s.c.Credentials)
	if err != nil {
		return nil, err
	}
	plain := func(host string) (bool, error) {
		if host == s.c.Registry {
			return false, nil
		}
		return docker.MatchLocalhost(host)
	}
	c := &http.Client{Transport: paced{t, s.patience.slow}}
	hosts := docker.ConfigureDefaultRegistries(docker.WithClient(c), docker.WithPlainHTTP(plain),
		// Public registries give everyone a token, but want to be asked for it.
		docker.WithAuthorizer(docker.NewDockerAuthorizer(docker.WithAuthClient(c), docker.WithAuthCreds(known.of))))
	return counting{docker.NewResolver(docker.ResolverOptions{Hosts: hosts}), count}, nil
}

// counting is a resolver that tells how many bytes its fetchers have read.
type counting struct {
	remotes.Resolver
	count func(int64)
}

func (c counting) Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error) {
	f, err := c.Resolver.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	return remotes.FetcherFunc(func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
		body, err := f.Fetch(ctx, d)
		if err != nil {
			return nil, err
		}
		return &countingBody{body, c.count}, nil
	}), nil
}

type countingBody struct {
	io.ReadCloser
	count func(int64)
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.count(int64(n))
	return n, err
}

// Seek lets a download continue where it was interrupted.
func (b *countingBody) Seek(offset int64, whence int) (int64, error) {
	if s, ok := b.ReadCloser.(io.Seeker); ok {
		return s.Seek(offset, whence)
	}
	return 0, errdefs.ErrNotImplemented
}

// meaning gives a pull's error the meaning that callers ask for.
func meaning(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	var netErr *net.OpError
	var urlErr *url.Error
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "unexpected media type"): // a page to log in, which is none of an image
		return fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, context.Canceled) || hasMeaning(err):
		return err
	case errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case isFull(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.As(err, &status), errors.As(err, &urlErr), errors.As(err, &netErr),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// isFull says whether there was no space: the text is what crosses the socket.
func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), unix.ENOSPC.Error())
}

func hasMeaning(err error) bool {
	return errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) || errdefs.IsInvalidArgument(err) ||
		errdefs.IsPermissionDenied(err) || errdefs.IsResourceExhausted(err)
}
