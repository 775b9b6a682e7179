package build

import (
	"archive/tar"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ociregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"ingot/internal/need"
	"ingot/internal/registry"
)

// entries are an image's files: the link's target, or the size.
func entries(t *testing.T, img v1.Image) map[string]*tar.Header {
	t.Helper()
	r := mutate.Extract(img)
	defer r.Close()
	found := map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s: of %v, %d:%d", h.Name, h.ModTime, h.Uid, h.Gid)
		}
		found[clean(h.Name)] = h
	}
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func TestKernel(t *testing.T) {
	need.Binary(t, "apt-get")
	var said []string
	o := Options{Progress: func(s string) { said = append(said, s) }}
	img, err := Kernel(t.Context(), o, []byte("init"))
	if err != nil {
		t.Fatal(err)
	}
	files := entries(t, img)
	if f := files[KernelPath]; f == nil || f.Size < 30<<20 {
		t.Errorf("kernel %+v", f)
	}
	if f := files[InitrdPath]; f == nil || f.Size < 500<<10 || f.Size > 5<<20 {
		t.Errorf("initrd %+v", f)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if v := config.Config.Labels[LabelVersion]; !strings.HasSuffix(v, "-cloud-amd64") {
		t.Errorf("version %q", v)
	}
	kept, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Layer(kept[0]); err != nil { // its sums are of another run
		t.Error(err)
	}
	said = nil
	again, err := Kernel(t.Context(), o, []byte("init"))
	if err != nil {
		t.Fatal(err)
	}
	if digest(t, again) != digest(t, img) {
		t.Error("the same parts made another image")
	}
	if slices.ContainsFunc(said, func(s string) bool { return !strings.HasPrefix(s, "assemble") }) {
		t.Errorf("the second build did %q", said)
	}
	other, err := Kernel(t.Context(), o, []byte("other init"))
	if err != nil {
		t.Fatal(err)
	}
	layers, otherLayers := layersOf(t, img), layersOf(t, other)
	if layers[0] != otherLayers[0] || layers[1] == otherLayers[1] {
		t.Error("another init is to change the second layer only")
	}
}

func layersOf(t *testing.T, img v1.Image) []string {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, l := range m.Layers {
		list = append(list, l.Digest.String())
	}
	return list
}

// A kernel is taken apart anew to the same bytes, from a package in a fresh cache.
func TestKernelAnew(t *testing.T) {
	need.Binary(t, "apt-get")
	img, err := Kernel(t.Context(), Options{}, []byte("init"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := Kernel(t.Context(), Options{Cache: freshCache(t)}, []byte("init"))
	if err != nil {
		t.Fatal(err)
	}
	if digest(t, again) != digest(t, img) {
		t.Error("the same package made another image")
	}
}

// freshCache has the packages of the usual one, and nothing else.
func freshCache(t *testing.T) string {
	t.Helper()
	debs, err := filepath.Glob(DefaultCache + "/deb/*.deb")
	if err != nil || len(debs) == 0 {
		t.Fatalf("no packages in the cache: %v", err)
	}
	cache := t.TempDir()
	if err := os.MkdirAll(cache+"/deb", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range debs {
		if err := os.Symlink(d, cache+"/deb/"+filepath.Base(d)); err != nil {
			t.Fatal(err)
		}
	}
	return cache
}

// An interrupt is what it is called, whatever the programs say that it has killed.
func TestInterruptedBuild(t *testing.T) {
	need.Binary(t, "apt-get")
	if _, err := Kernel(t.Context(), Options{}, []byte("init")); err != nil { // for the package
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	defer time.AfterFunc(time.Second, cancel).Stop() // in the middle
	_, err := Kernel(ctx, Options{Cache: freshCache(t)}, []byte("init"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// What killed builds have left in the cache goes with the next, unless one is at work.
func TestLeftovers(t *testing.T) {
	o := Options{Cache: t.TempDir()}
	left := []string{".busybox-1/busybox", ".debian-1/own/x", ".ingot-1", "deb/.download-1/a.deb", "kernel/6.1/.ingot-1"}
	litter := func() {
		for _, name := range append(left, "deb/a.deb", "kernel/6.1/modules", "debian-bookworm-1.tar.gz") {
			path := filepath.Join(o.Cache, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	files := func() (n int) {
		filepath.WalkDir(o.Cache, func(_ string, d os.DirEntry, _ error) error {
			if !d.IsDir() {
				n++
			}
			return nil
		})
		return n
	}
	hold := func() *os.File {
		t.Helper()
		f, err := o.hold()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	litter()
	first := hold()
	if n := files(); n != 3 {
		t.Errorf("%d files after the first", n)
	}
	litter()
	second := hold()
	if n := files(); n != 3+len(left) {
		t.Errorf("%d files, of which %d may be the first's", n, len(left))
	}
	first.Close()
	hold().Close() // the second is at work
	if n := files(); n != 3+len(left) {
		t.Errorf("%d files, of which %d may be the second's", n, len(left))
	}
	second.Close()
	hold().Close()
	if n := files(); n != 3 {
		t.Errorf("%d files in the end", n)
	}
}

func TestBusybox(t *testing.T) {
	need.Binary(t, "apt-get")
	img, err := Busybox(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	files := entries(t, img)
	for _, name := range []string{"bin/sh", "bin/ls", "sbin/udhcpc", "etc/passwd", "etc/udhcpc/default.script", "tmp", "proc", "dev"} {
		if files[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	for _, name := range []string{"sbin/init", "bin/init", "linuxrc"} {
		if files[name] != nil {
			t.Errorf("%s would take the place of the guest's init", name)
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"sh"}, config.Config.Cmd); d != "" {
		t.Error(d)
	}
	again, err := Busybox(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if digest(t, again) != digest(t, img) {
		t.Error("the same parts made another image")
	}
}

func TestLoadOrder(t *testing.T) {
	all := map[string]module{
		"a": {name: "a", needs: []string{"b", "c"}}, "b": {name: "b", needs: []string{"c"}}, "c": {name: "c"},
		"d_e": {name: "d_e"}, "broken": {name: "broken", needs: []string{"missing"}},
	}
	got, err := loadOrder(all, []string{"a", "built-in", "d-e", "c"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"c", "b", "a", "d_e"}, got); d != "" {
		t.Error(d)
	}
	if _, err := loadOrder(all, []string{"broken"}); !errdefs.IsNotFound(err) {
		t.Errorf("a missing module: %v", err)
	}
	if _, err := loadOrder(nil, []string{"a"}); !errdefs.IsNotFound(err) {
		t.Errorf("no modules at all: %v", err)
	}
	for name, want := range map[string]bool{"lib/a.ko": false, "lib/a.ko.xz": true, "lib/a.ko.zst": true, "lib/a.koala": false, "lib/x.xz": false} {
		if isCompressed(name) != want {
			t.Errorf("%s: compressed: %t", name, !want)
		}
	}
}

// ownRegistry runs the environment's registry.
func ownRegistry(t *testing.T) Registry {
	t.Helper()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	s, err := registry.New(registry.Config{Dir: dir + "/data", Listen: address, CertFile: dir + "/cert.pem", KeyFile: dir + "/key.pem", User: "ingot", Password: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }() // waited for below
	t.Cleanup(func() {
		cancel()
		<-done
	})
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatal(err)
	}
	return Registry{Address: address, CAFile: dir + "/cert.pem", User: "ingot", Password: "secret"}
}

func TestPush(t *testing.T) {
	r := ownRegistry(t)
	ctx := t.Context()
	layer, err := memoryLayer(func(a *archive) { a.file("hello", 0o644, []byte("world")) })
	if err != nil {
		t.Fatal(err)
	}
	img, err := assemble(v1.Config{Labels: map[string]string{LabelVersion: "1"}}, layer)
	if err != nil {
		t.Fatal(err)
	}
	if there, err := Exists(ctx, r, "hello"); err != nil || there {
		t.Fatalf("exists: %v, %v", there, err)
	}
	pushed, err := Push(ctx, r, "hello", img)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Push(ctx, r, "hello:latest", img); err != nil || again != pushed {
		t.Errorf("pushed again: %s, %v", again, err)
	}
	if there, err := Exists(ctx, r, r.Address+"/hello:latest"); err != nil || !there {
		t.Errorf("exists: %v, %v", there, err)
	}
	file := filepath.Join(t.TempDir(), "hello.tar")
	if err := Save(file, "hello", img); err != nil {
		t.Fatal(err)
	}
	wrong := r
	wrong.Password = "guess"
	if _, err := Push(ctx, wrong, "x", img); !errdefs.IsUnauthorized(err) {
		t.Errorf("a wrong password: %v", err)
	}
	wrong.User = ""
	if _, err := Push(ctx, wrong, "x", img); !errdefs.IsUnauthorized(err) {
		t.Errorf("no password: %v", err)
	}
	if d, err := Digest(ctx, wrong, "hello"); err != nil || d != pushed {
		t.Errorf("anonymous read: %s, %v", d, err)
	}
	if _, err := Push(ctx, r, "Bad Name", img); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
}

func TestList(t *testing.T) {
	server := httptest.NewTLSServer(ociregistry.New(ociregistry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	r := Registry{Address: server.Listener.Addr().String(), CAFile: ca}
	layer, err := memoryLayer(func(a *archive) { a.file("hello", 0o644, []byte("world")) })
	if err != nil {
		t.Fatal(err)
	}
	img, err := assemble(v1.Config{Labels: map[string]string{LabelVersion: "1"}}, layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"b", "a:v2", "a"} {
		if _, err := Push(t.Context(), r, ref, img); err != nil {
			t.Fatal(err)
		}
	}
	list, err := List(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
		if i.Digest != digest(t, img) || i.Size == 0 || i.Labels[LabelVersion] != "1" {
			t.Errorf("image %+v", i)
		}
	}
	if d := cmp.Diff([]string{"a:latest", "a:v2", "b:latest"}, names); d != "" {
		t.Error(d)
	}
}
