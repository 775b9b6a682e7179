package image

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
)

// TestTokenRegistry pulls as from a public registry: everyone gets a token, but
// has to ask for it.
func TestTokenRegistry(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	behind := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: l.registry})
	behind.Transport = l.transport(t)
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			io.WriteString(w, `{"token":"for everyone"}`)
		case r.Header.Get("Authorization") != "Bearer for everyone":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="https://%s/token",service="front",scope="repository:base:pull"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
		default:
			r.Header.Del("Authorization")
			behind.ServeHTTP(w, r)
		}
	}))
	pair, err := tls.LoadX509KeyPair(l.ca, l.key)
	if err != nil {
		t.Fatal(err)
	}
	front.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	front.StartTLS()
	defer front.Close()
	address := strings.TrimPrefix(front.URL, "https://")
	s, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: address, CAFile: l.ca})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := prepare(t, s, "flintlock/ns/token/01", standard())
	run(t, "e2fsck", "-fn", p.Volumes["root"])
}

func TestResolve(t *testing.T) {
	s := &Store{c: Config{Registry: "192.168.10.2:5000"}}
	for ref, want := range map[string]string{
		"busybox":                     "192.168.10.2:5000/busybox:latest",
		"busybox:v1":                  "192.168.10.2:5000/busybox:v1",
		"team/app":                    "192.168.10.2:5000/team/app:latest",
		"ghcr.io/a/b:v2":              "ghcr.io/a/b:v2",
		"localhost/a":                 "localhost/a:latest",
		"10.0.0.1:80/a":               "10.0.0.1:80/a:latest",
		"docker.io/library/alpine":    "docker.io/library/alpine:latest",
		"a@sha256:" + zeros:           "192.168.10.2:5000/a@sha256:" + zeros,
		"":                            "",
		"UPPER":                       "",
		"a b":                         "",
		"a:":                          "",
		"../../etc/passwd":            "",
		"busybox@sha256:0":            "",
		"-flag":                       "",
		"https://ghcr.io/a":           "",
		strings.Repeat("a", 300):      "",
		"host.example/" + "x\n" + "y": "",
	} {
		got, err := s.Resolve(ref)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", ref, got, err, want)
		}
	}
	if got, err := (&Store{}).Resolve("busybox"); err == nil {
		t.Errorf("without a registry: %q", got)
	}
}

const zeros = "0000000000000000000000000000000000000000000000000000000000000000"

func FuzzResolve(f *testing.F) {
	for _, seed := range []string{"busybox", "a/b:c", "h.example:1/x@sha256:" + zeros, "..", "a//b"} {
		f.Add(seed)
	}
	s := &Store{c: Config{Registry: "r.example:5000"}}
	f.Fuzz(func(t *testing.T, ref string) {
		full, err := s.Resolve(ref)
		if err != nil {
			return
		}
		if again, err := s.Resolve(full); err != nil || again != full {
			t.Errorf("%q resolves to %q, and that to %q, %v", ref, full, again, err)
		}
	})
}
