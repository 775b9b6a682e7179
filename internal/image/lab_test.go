package image

import (
	"archive/tar"
	"bufio"
	"bytes"
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
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"ingot/internal/registry"
)

// lab is a registry and a containerd, both real.
type lab struct {
	dir      string
	registry string // host:port
	ca, key  string // files
	daemon   *exec.Cmd
}

func newLab(t testing.TB) *lab {
	t.Helper()
	needs(t, "mkfs.xfs", "mkfs.ext4", "e2fsck", "debugfs")
	l := &lab{dir: t.TempDir()}
	t.Cleanup(func() { syscall.Unmount(filepath.Join(l.dir, "pool"), syscall.MNT_DETACH) })
	l.startRegistry(t)
	l.start(t)
	return l
}

func (l *lab) startRegistry(t testing.TB) {
	t.Helper()
	cert, key := certificate(t, l.dir)
	l.ca, l.key = cert, key
	l.registry = freePort(t)
	s, err := registry.New(registry.Config{
		Dir: filepath.Join(l.dir, "registry"), Listen: l.registry,
		CertFile: cert, KeyFile: key, User: "ingot", Password: "secret",
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
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
}

// start runs this test's binary as containerd and waits until it is ready.
func (l *lab) start(t testing.TB) {
	t.Helper()
	l.daemon = exec.Command("/proc/self/exe")
	l.daemon.Env = append(os.Environ(), "IMAGE_TEST_CONTAINERD="+l.dir)
	log, err := os.OpenFile(filepath.Join(l.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	l.daemon.Stderr = log
	l.daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := l.daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	started := l.daemon
	t.Cleanup(func() {
		started.Process.Signal(syscall.SIGTERM)
		if err := started.Wait(); err != nil && started.ProcessState.ExitCode() > 0 {
			t.Errorf("containerd: %v", err)
		}
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(l.dir, "log"))
			t.Logf("containerd said:\n%s", log)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		log, _ := os.ReadFile(filepath.Join(l.dir, "log"))
		t.Fatalf("containerd did not start: %v\n%s", err, log)
	}
}

func (l *lab) kill(t testing.TB) {
	t.Helper()
	if err := l.daemon.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	l.daemon.Wait()
}

func (l *lab) open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: l.registry, CAFile: l.ca})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// ctr runs the command that people look with, and returns its lines but the heading.
func (l *lab) ctr(t testing.TB, args ...string) []string {
	t.Helper()
	c := exec.Command("/proc/self/exe", append([]string{"-a", l.dir + "/c.sock", "-n", "flintlock"}, args...)...)
	c.Env = append(os.Environ(), "IMAGE_TEST_CTR=1")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("ctr %v: %v\n%s", args, err, out)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")[1:]
}

// file is one file of an image's layer; link makes it a symbolic link.
type file struct {
	name, data, link string
}

func layer(t testing.TB, files ...file) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.data)), Typeflag: tar.TypeReg}
		if f.link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, f.link, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// push makes an image of one layer for each list of files, in the registry.
func (l *lab) push(t testing.TB, ref string, layers ...[]file) {
	t.Helper()
	img := empty.Image
	for _, files := range layers {
		var err error
		if img, err = mutate.AppendLayers(img, layer(t, files...)); err != nil {
			t.Fatal(err)
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Architecture, c.OS = "amd64", "linux"
	c.Config = v1.Config{Entrypoint: []string{"/bin/app"}, Cmd: []string{"-v"}, Env: []string{"A=b=c"}, WorkingDir: "/srv", User: "7"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	l.pushImage(t, ref, img)
}

func (l *lab) pushImage(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	to, options := l.to(t, ref)
	if err := remote.Write(to, img, options...); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) pushIndex(t testing.TB, ref string, index v1.ImageIndex) {
	t.Helper()
	to, options := l.to(t, ref)
	if err := remote.WriteIndex(to, index, options...); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) to(t testing.TB, ref string) (name.Reference, []remote.Option) {
	t.Helper()
	to, err := name.ParseReference(l.registry + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	auth := remote.WithAuth(&authn.Basic{Username: "ingot", Password: "secret"})
	return to, []remote.Option{auth, remote.WithTransport(l.transport(t))}
}

func (l *lab) transport(t testing.TB) http.RoundTripper {
	t.Helper()
	data, err := os.ReadFile(l.ca)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(data)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// noise is data that does not compress.
func noise(n int) string {
	b := make([]byte, n)
	r := mathrand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return string(b)
}

func certificate(t testing.TB, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "image test"},
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
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
