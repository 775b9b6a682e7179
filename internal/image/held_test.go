package image

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

// names are the images without their registry, each with its users.
func (l *lab) held(t *testing.T, s *Store, vms []vm.Spec) map[string][]string {
	t.Helper()
	list, err := s.Images(t.Context(), vms)
	if err != nil {
		t.Fatal(err)
	}
	users := map[string][]string{}
	for _, h := range list {
		users[strings.TrimPrefix(h.Name, l.registry+"/")] = h.VMs
		if h.Size == 0 || !strings.HasPrefix(h.Digest, "sha256:") || time.Since(h.Used) > time.Minute {
			t.Errorf("image %+v", h)
		}
	}
	return users
}

// one is a microVM that is made of a request.
func one(uid string, r Request) []vm.Spec {
	return []vm.Spec{{UID: uid, Kernel: vm.Kernel{File: r.Kernel}, Initrd: r.Initrd, Root: r.Root, Volumes: r.Volumes}}
}

// What a microVM uses is there for its restart; all else can go, and leaves
// nothing behind.
func TestRemoveImages(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	l.push(t, "other", []file{{name: "big", data: noise(300_000)}})
	s, vms := l.open(t), one("01", standard())
	prepare(t, s, "flintlock/ns/vm/01", standard())
	if err := s.Pull(t.Context(), "other", "", nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string][]string{"base:latest": {"01"}, "kernel:latest": {"01"}, "other:latest": nil}, l.held(t, s, vms)); d != "" {
		t.Fatal(d)
	}
	before, err := s.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), vms, "other", "base"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "01") {
		t.Errorf("one in use: %v", err)
	}
	if _, err := s.Remove(t.Context(), vms, "none"); !errdefs.IsNotFound(err) {
		t.Errorf("one that is not there: %v", err)
	}
	if gone, err := s.Remove(t.Context(), vms, "other"); err != nil || len(gone) != 1 {
		t.Fatalf("%v, %v", gone, err)
	}
	after, err := s.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.Snapshots != before.Snapshots-1 || after.ContentBytes > before.ContentBytes-300_000 {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	// A newer image under the name is what a restart asks for.
	l.push(t, "base", []file{{name: "etc/version", data: "3"}})
	if err := s.Pull(t.Context(), "base", Always, nil); err != nil {
		t.Fatal(err)
	}
	if gone, err := s.Prune(t.Context(), vms, time.Now()); err != nil || len(gone) != 0 {
		t.Errorf("pruned %v, %v", gone, err)
	}
	// The volumes that were made from the older one live on.
	prepare(t, s, "flintlock/ns/vm/01", standard())
	if err := s.Release(t.Context(), "flintlock/ns/vm/01"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	end, err := s.Facts(t.Context())
	if err != nil || len(end.Images) > 0 || end.Snapshots > 0 || end.Content > 0 {
		t.Errorf("at the end %+v, %v", end, err)
	}
}

// Another name of the same layers is no use of them.
func TestTwoNames(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	l.push(t, "twin", rootFiles, []file{{name: "etc/version", data: "2"}})
	s, vms := l.open(t), one("01", standard())
	p := prepare(t, s, "flintlock/ns/vm/01", standard())
	for _, ref := range []string{"base", "twin"} {
		if err := s.Pull(t.Context(), ref, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff(map[string][]string{"base:latest": {"01"}, "kernel:latest": {"01"}, "twin:latest": nil}, l.held(t, s, vms)); d != "" {
		t.Error(d)
	}
	if _, err := s.Remove(t.Context(), vms, "base"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the one in use: %v", err)
	}
	if gone, err := s.Remove(t.Context(), vms, "twin"); err != nil || len(gone) != 1 {
		t.Errorf("the other one: %v, %v", gone, err)
	}
	if err := s.Pull(t.Context(), "twin", "", nil); err != nil {
		t.Fatal(err)
	}
	if gone, err := s.Prune(t.Context(), vms, time.Now()); err != nil || len(gone) != 1 || !strings.HasSuffix(gone[0].Name, "/twin:latest") {
		t.Errorf("pruned %v, %v", gone, err)
	}
	run(t, "e2fsck", "-fn", p.Volumes["root"])
	// The registry is not asked: what the microVM is made of is all here.
	offline, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: l.registry, CAFile: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	defer offline.Close()
	prepare(t, offline, "flintlock/ns/vm/01", standard())
}

// What nobody has used for long goes by itself, in a full pool sooner, and what
// a microVM has never.
func TestCollect(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	l.push(t, "other", []file{{name: "x", data: noise(1000)}})
	s, vms := l.open(t), one("01", standard())
	prepare(t, s, "flintlock/ns/vm/01", standard())
	if err := s.Pull(t.Context(), "other", "", nil); err != nil {
		t.Fatal(err)
	}
	collect := func(c Collector, later time.Duration) (names []string) {
		t.Helper()
		c.Images, c.VMs = s, func() []vm.Spec { return vms }
		gone, err := c.Collect(t.Context(), time.Now().Add(later))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range gone {
			names = append(names, strings.TrimPrefix(h.Name, l.registry+"/"))
		}
		return names
	}
	full := Collector{Pool: l.dir, Full: 1}
	facts, err := pool.ReadFacts(l.dir)
	if err != nil || facts.Used*100 < facts.Size {
		t.Fatalf("the pool is too empty for this test: %+v, %v", facts, err)
	}
	if got := collect(full, 0); got != nil {
		t.Errorf("just pulled: %v", got)
	}
	if got := collect(Collector{Unused: DefaultUnused, Pool: l.dir}, 6*24*time.Hour); got != nil {
		t.Errorf("after six days: %v", got)
	}
	if got := collect(Collector{Pool: l.dir}, 1000*time.Hour); got != nil {
		t.Errorf("kept for ever: %v", got)
	}
	if got := collect(full, 2*time.Hour); !slices.Equal(got, []string{"other:latest"}) {
		t.Errorf("in a full pool: %v", got)
	}
	if err := s.Pull(t.Context(), "other", "", nil); err != nil {
		t.Fatal(err)
	}
	if got := collect(Collector{Unused: DefaultUnused}, 8*24*time.Hour); !slices.Equal(got, []string{"other:latest"}) {
		t.Errorf("after eight days: %v", got)
	}
	if d := cmp.Diff(map[string][]string{"base:latest": {"01"}, "kernel:latest": {"01"}}, l.held(t, s, vms)); d != "" {
		t.Error(d)
	}
}

func TestPolicy(t *testing.T) {
	l := newLab(t)
	l.push(t, "a", rootFiles)
	l.push(t, "a:v1", rootFiles)
	s := l.open(t)
	pull := func(ref string, p Policy) (asked bool) {
		t.Helper()
		err := s.Pull(t.Context(), ref, p, func(p Progress) { asked = asked || p.Status == "resolve" })
		if err != nil {
			t.Fatalf("%s %s: %v", ref, p, err)
		}
		return asked
	}
	if err := s.Pull(t.Context(), "a", Never, nil); !errdefs.IsNotFound(err) {
		t.Errorf("never, and it is not there: %v", err)
	}
	if err := s.Pull(t.Context(), "a", "often", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a policy that is none: %v", err)
	}
	for _, c := range []struct {
		ref  string
		p    Policy
		asks bool
	}{
		{"a", Missing, true}, {"a", Missing, false}, {"a", Never, false}, {"a", "", true}, {"a", Always, true},
		{"a:v1", "", true}, {"a:v1", "", false}, {"a:v1", Always, true},
	} {
		if got := pull(c.ref, c.p); got != c.asks {
			t.Errorf("%s, policy %q: asked the registry: %t", c.ref, c.p, got)
		}
	}
	if err := s.Pull(t.Context(), "a", "often", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a policy that is none, for an image that is here: %v", err)
	}
}

// An image that is larger than a volume gets larger volumes.
func TestLargeImage(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	zeros := strings.Repeat("\x00", 200<<20)
	l.push(t, "large", rootFiles, []file{{name: "one", data: zeros}}, []file{{name: "two", data: zeros[:100<<20]}})
	s := l.open(t)
	r := standard()
	r.Root.Image = "large"
	p := prepare(t, s, "flintlock/ns/large/01", r)
	info, err := os.Stat(p.Volumes["root"])
	if err != nil || info.Size() != (4*vm.MiB(256)).Bytes() {
		t.Errorf("the volume has %d bytes, %v", info.Size(), err)
	}
	run(t, "e2fsck", "-fn", p.Volumes["root"])
	if out := run(t, "debugfs", "-R", "stat /two", p.Volumes["root"]); !strings.Contains(out, fmt.Sprint(100<<20)) {
		t.Errorf("the last file: %s", out)
	}
	info, err = os.Stat(p.Volumes["data"])
	if err != nil || info.Size() != vm.MiB(256).Bytes() {
		t.Errorf("another image's volume has %d bytes, %v", info.Size(), err)
	}
}

// TestCredentials pulls from a registry that wants a name and a password, which
// stand in a file that changes.
func TestCredentials(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	behind := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: l.registry})
	behind.Transport = l.transport(t)
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "pass:word" {
			w.Header().Set("WWW-Authenticate", `Basic realm="front"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.Header.Del("Authorization")
		behind.ServeHTTP(w, r)
	}))
	pair, err := tls.LoadX509KeyPair(l.ca, l.key)
	if err != nil {
		t.Fatal(err)
	}
	front.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	front.StartTLS()
	defer front.Close()
	address := strings.TrimPrefix(front.URL, "https://")
	file := filepath.Join(t.TempDir(), "auth.json")
	s, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: address, CAFile: l.ca, Credentials: file})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Pull(t.Context(), "base", "", nil); !errdefs.IsPermissionDenied(err) {
		t.Errorf("without the file: %v", err)
	}
	auth := func(user, password string) {
		t.Helper()
		text := fmt.Sprintf(`{"auths": {"https://%s/v1/": {"auth": %q}}}`, address, base64.StdEncoding.EncodeToString([]byte(user+":"+password)))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	auth("me", "wrong")
	if err := s.Pull(t.Context(), "base", "", nil); !errdefs.IsPermissionDenied(err) || strings.Contains(err.Error(), "wrong") {
		t.Errorf("a wrong password: %v", err)
	}
	auth("me", "pass:word")
	if err := s.Pull(t.Context(), "base", "", nil); err != nil {
		t.Error(err)
	}
}

func TestParseCredentials(t *testing.T) {
	good := `{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}, "r.example:5000": {"username": "u", "password": "p"}, "quay.io/org": {"identitytoken": "tok"}}, "HttpHeaders": {}}`
	got, err := parseCredentials([]byte(good))
	want := credentials{"registry-1.docker.io": {"a", "b"}, "r.example:5000": {"u", "p"}, "quay.io": {"", "tok"}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "[]", `{"auths": {"x": {"auth": "%"}}}`, `{"auths": {"x": {"auth": "YQ=="}}}`, `{"credsStore": "desktop"}`, `{"credHelpers": {"x": "gcr"}}`} {
		if _, err := parseCredentials([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func FuzzParseCredentials(f *testing.F) {
	f.Add([]byte(`{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}}}`))
	f.Add([]byte(`{"auths": {"": {"username": "u"}}, "credHelpers": {}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		known, err := parseCredentials(text)
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v", err)
		}
		if _, _, err := known.of("x"); err != nil {
			t.Error(err)
		}
	})
}
