package registry

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

var owner = &authn.Basic{Username: "ingot", Password: "secret"}

// start runs a registry and returns it with its address and a client that
// trusts its certificate.
func start(t *testing.T, dir string) (*Server, string, http.RoundTripper) {
	t.Helper()
	return startStalling(t, dir, 0)
}

func startStalling(t *testing.T, dir string, stall time.Duration) (*Server, string, *http.Transport) {
	t.Helper()
	cert, key, pool := certificate(t)
	listen := freePort(t)
	s, err := New(Config{Dir: dir, Listen: listen, CertFile: cert, KeyFile: key, User: owner.Username, Password: owner.Password, Stall: stall})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatal(err)
	}
	return s, listen, transport
}

func push(address, ref string, transport http.RoundTripper, auth authn.Authenticator) error {
	to, err := name.ParseReference(address + "/" + ref)
	if err != nil {
		return err
	}
	img, err := random.Image(10_000, 2)
	if err != nil {
		return err
	}
	return remote.Write(to, img, remote.WithAuth(auth), remote.WithTransport(transport))
}

func TestPushPullDelete(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there", "yet")
	s, address, transport := start(t, dir)
	if f, err := s.Facts(t.Context()); err != nil || len(f.Repositories) != 0 {
		t.Errorf("facts of an empty registry: %+v, %v", f, err)
	}
	for _, ref := range []string{"busybox:latest", "busybox:v1", "team/app:v2"} {
		if err := push(address, ref, transport, owner); err != nil {
			t.Fatal(err)
		}
	}
	want := []Repository{{"busybox", []string{"latest", "v1"}}, {"team/app", []string{"v2"}}}
	if f, err := s.Facts(t.Context()); err != nil || cmp.Diff(want, f.Repositories) != "" {
		t.Errorf("facts: %v, %s", err, cmp.Diff(want, f.Repositories))
	}
	from, err := name.ParseReference(address + "/busybox:v1")
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(from, remote.WithTransport(transport))
	if err != nil {
		t.Fatalf("pull without credentials: %v", err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 2 {
		t.Fatalf("layers: %d, %v", len(layers), err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Delete(from.Context().Digest(digest.String()), remote.WithTransport(transport)); err == nil {
		t.Error("deleted without credentials")
	}
	if err := remote.Delete(from.Context().Digest(digest.String()), remote.WithTransport(transport), remote.WithAuth(owner)); err != nil {
		t.Error(err)
	}
	if _, err := remote.Head(from, remote.WithTransport(transport)); err == nil {
		t.Error("the image is there after it was deleted")
	}
}

// TestWritesNeedCredentials tries every way to write, with everything but the
// right password.
func TestWritesNeedCredentials(t *testing.T) {
	s, address, transport := start(t, t.TempDir())
	for _, auth := range []authn.Authenticator{
		authn.Anonymous,
		&authn.Basic{Username: "ingot", Password: "wrong"},
		&authn.Basic{Username: "ingot"},
		&authn.Basic{Username: "other", Password: "secret"},
		&authn.Bearer{Token: "secret"},
	} {
		if err := push(address, "busybox", transport, auth); err == nil {
			t.Errorf("pushed with %+v", auth)
		}
	}
	client := &http.Client{Transport: transport}
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "BREW"} {
		r, err := http.NewRequestWithContext(t.Context(), method, "https://"+address+"/v2/busybox/blobs/uploads/", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		a, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		a.Body.Close()
		if a.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %s", method, a.Status)
		}
	}
	if f, err := s.Facts(t.Context()); err != nil || len(f.Repositories) != 0 {
		t.Errorf("facts: %+v, %v", f, err)
	}
}

// TestNobodyWrites: without a user or a password in the configuration, empty
// credentials are not the right ones.
func TestNobodyWrites(t *testing.T) {
	for _, c := range []Config{{}, {User: "ingot"}, {Password: "secret"}} {
		r, err := http.NewRequest("PUT", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth(c.User, c.Password)
		if (&Server{c: c}).mayWrite(r) {
			t.Errorf("%+v may write", c)
		}
	}
}

func TestMissingCertificate(t *testing.T) {
	s, err := New(Config{Dir: t.TempDir(), Listen: "127.0.0.1:0", CertFile: "/nonexistent/cert", KeyFile: "/nonexistent/key"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "/nonexistent/cert") {
		t.Errorf("got %v", err)
	}
}

// TestSlowClients: who makes some progress gets all, who makes none loses the
// connection, with HTTP/1.1 and HTTP/2.
func TestSlowClients(t *testing.T) {
	const stall = 500 * time.Millisecond
	s, address, transport := startStalling(t, t.TempDir(), stall)
	to, err := name.ParseReference(address + "/big")
	if err != nil {
		t.Fatal(err)
	}
	layer, err := random.Layer(32<<20, types.DockerLayer) // more than the kernel's buffers hold
	if err != nil {
		t.Fatal(err)
	}
	slow := &slowly{transport, stall}
	if err := remote.WriteLayer(to.Context(), layer, remote.WithAuth(owner), remote.WithTransport(slow)); err != nil {
		t.Fatalf("a slow push: %v", err)
	}
	digest, err := layer.Digest()
	if err != nil {
		t.Fatal(err)
	}
	size, err := layer.Size()
	if err != nil {
		t.Fatal(err)
	}
	for _, two := range []bool{false, true} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: transport.TLSClientConfig.Clone(), ForceAttemptHTTP2: two}}
		defer client.CloseIdleConnections()
		pull := func(pause time.Duration, times int) (read int64, err error) {
			a, err := client.Get("https://" + address + "/v2/big/blobs/" + digest.String())
			if err != nil {
				t.Fatal(err)
			}
			defer a.Body.Close()
			if two != (a.ProtoMajor == 2) {
				t.Fatalf("the answer came by %s", a.Proto)
			}
			for range times {
				n, err := io.CopyN(io.Discard, a.Body, size/int64(times+1))
				if read += n; err != nil {
					return read, err
				}
				time.Sleep(pause)
			}
			n, err := io.Copy(io.Discard, a.Body)
			return read + n, err
		}
		if n, err := pull(stall/4, 6); n != size || err != nil {
			t.Errorf("HTTP/2 %v: a slow client got %d bytes of %d, %v", two, n, size, err)
		}
		if n, err := pull(2*stall, 1); err == nil {
			t.Errorf("HTTP/2 %v: a client that did not read for long got %d bytes of %d", two, n, size)
		}
	}
	if _, ok := s.requests.Take(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}); !ok {
		t.Error("no request is let in")
	}
}

// slowly sends what bodies hold in pieces, with pauses.
type slowly struct {
	*http.Transport
	stall time.Duration
}

func (s *slowly) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPatch {
		r = r.Clone(r.Context())
		r.Body = &slowBody{ReadCloser: r.Body, pause: s.stall / 4}
	}
	return s.Transport.RoundTrip(r)
}

type slowBody struct {
	io.ReadCloser
	pause time.Duration
	read  int
}

func (b *slowBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.read/(4<<20) != (b.read+n)/(4<<20) {
		time.Sleep(b.pause)
	}
	b.read += n
	return n, err
}

func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "registry test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return cert, key, pool
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
