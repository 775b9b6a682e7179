package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// illness is what a registry does instead of its work; nil: it works.
type illness func(w http.ResponseWriter, r *http.Request, well http.Handler)

// trickle sends a byte now and then, for ever.
func trickle(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Length", "100000")
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	for {
		select {
		case <-r.Context().Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
		if _, err := w.Write([]byte{' '}); err != nil {
			return
		}
		w.(http.Flusher).Flush()
	}
}

func isBlob(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

// TestIllRegistry: whatever a registry does, a pull ends soon and says why, leaves
// nothing, and the next one works once the registry does.
func TestIllRegistry(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	well := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: l.registry})
	well.Transport = l.transport(t)
	var ill atomic.Pointer[illness]
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if now := ill.Load(); now != nil {
			(*now)(w, r, well)
			return
		}
		well.ServeHTTP(w, r)
	}))
	pair, err := tls.LoadX509KeyPair(l.ca, l.key)
	if err != nil {
		t.Fatal(err)
	}
	front.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	front.StartTLS()
	t.Cleanup(front.Close)
	s, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: strings.TrimPrefix(front.URL, "https://"), CAFile: l.ca})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.patience = patience{connect: time.Second, answer: 500 * time.Millisecond, stall: 700 * time.Millisecond, slow: time.Second}
	for name, c := range map[string]struct {
		ill   illness
		is    func(error) bool
		words string
	}{
		"answers 500": {func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			http.Error(w, "out of order", http.StatusInternalServerError)
		}, errdefs.IsUnavailable, "500"},
		"has manifests, and 503 for blobs": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if isBlob(r) {
				http.Error(w, "later", http.StatusServiceUnavailable)
				return
			}
			well.ServeHTTP(w, r)
		}, errdefs.IsUnavailable, "503"},
		"accepts, and says nothing": {func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
			<-r.Context().Done()
		}, errdefs.IsUnavailable, "timeout awaiting response headers"},
		"begins a blob, and says no more": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if !isBlob(r) {
				well.ServeHTTP(w, r)
				return
			}
			w.Header().Set("Content-Length", "100000")
			io.WriteString(w, "some")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, errdefs.IsUnavailable, "timeout"},
		"trickles blobs": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if !isBlob(r) {
				well.ServeHTTP(w, r)
				return
			}
			trickle(w, r)
		}, errdefs.IsUnavailable, "the registry is too slow"},
		"trickles manifests": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if isBlob(r) || r.Method == http.MethodHead {
				well.ServeHTTP(w, r)
				return
			}
			trickle(w, r)
		}, errdefs.IsUnavailable, "the registry is too slow"},
		"is a web page": {func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>log in</html>")
		}, errdefs.IsUnavailable, "text/html"},
		"sends other bytes": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if !isBlob(r) {
				well.ServeHTTP(w, r)
				return
			}
			io.WriteString(w, strings.Repeat("garbage ", 100))
		}, errdefs.IsFailedPrecondition, "past expected size"},
		"sends bytes that are false": {func(w http.ResponseWriter, r *http.Request, well http.Handler) {
			if !isBlob(r) {
				well.ServeHTTP(w, r)
				return
			}
			answer := httptest.NewRecorder()
			well.ServeHTTP(answer, r)
			body := answer.Body.Bytes()
			if len(body) > 0 {
				body[0]++
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			w.Write(body)
		}, errdefs.IsFailedPrecondition, "unexpected commit digest"},
		"hangs up": {func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) },
			errdefs.IsUnavailable, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			ill.Store(&c.ill)
			began := time.Now()
			_, err := s.Prepare(t.Context(), "flintlock/ns/ill/01", standard(), nil)
			took := time.Since(began)
			t.Logf("after %v: %v", took.Round(time.Millisecond), err)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "pull image ") {
				t.Errorf("%v, want %q", err, c.words)
			}
			if took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			ill.Store(nil)
			prepare(t, s, "flintlock/ns/ill/01", standard())
			if err := s.Release(t.Context(), "flintlock/ns/ill/01"); err != nil {
				t.Fatal(err)
			}
			l.forget(t, s)
		})
	}
}

// forget removes all images, and finds that nothing of them or of a pull is left.
func (l *lab) forget(t *testing.T, s *Store) {
	t.Helper()
	if _, err := s.Prune(t.Context(), nil, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	var f Facts
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var err error
		if f, err = s.Facts(t.Context()); err != nil {
			t.Fatal(err)
		}
		if f.Content == 0 && f.Snapshots == 0 && len(f.Leases) == 0 {
			return
		}
	}
	t.Fatalf("left behind: %+v", f)
}

// TestContainerdHangs: what is asked of a containerd that hangs ends and says so, and
// works again with it.
func TestContainerdHangs(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	prepare(t, s, "flintlock/ns/before/01", standard())
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := l.daemon.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	t.Cleanup(func() { l.daemon.Process.Signal(syscall.SIGCONT) })
	for what, do := range map[string]func() error{
		"prepare": func() error {
			_, err := s.Prepare(t.Context(), "flintlock/ns/hung/01", standard(), nil)
			return err
		},
		"release": func() error { return s.Release(t.Context(), "flintlock/ns/before/01") },
		"images":  func() error { _, err := s.Images(t.Context(), nil); return err },
		"record": func() error {
			return s.Record(t.Context(), "flintlock/ns/before/01", nil, []byte("{}"))
		},
		"leases": func() error { _, err := s.Leases(t.Context()); return err },
		"pull":   func() error { return s.Pull(t.Context(), "base", Always, nil) },
	} {
		began := time.Now()
		err := do()
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "containerd does not answer") {
			t.Errorf("%s: %v", what, err)
		}
		if took := time.Since(began); took > watchEvery+silence+5*time.Second {
			t.Errorf("%s: it took %v", what, took)
		}
	}
	began := time.Now()
	if err := s.Check(t.Context(), standard()); err != nil || time.Since(began) > time.Second {
		t.Errorf("check: %v after %v", err, time.Since(began))
	}
	signal(syscall.SIGCONT)
	prepare(t, s, "flintlock/ns/hung/01", standard())
	for _, lease := range []string{"flintlock/ns/hung/01", "flintlock/ns/before/01"} {
		if err := s.Release(t.Context(), lease); err != nil {
			t.Error(err)
		}
	}
	l.forget(t, s)
}

// TestPlaces: a registry has no more places than its own, whoever else comes gets one
// at once, and those who wait get theirs in turn or leave without a trace.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(4, 2)
		quiet := func() {}
		take := func(kind string) func() {
			t.Helper()
			give, err := p.take(t.Context(), kind, func() { t.Errorf("%s waits", kind) })
			if err != nil {
				t.Fatal(err)
			}
			return give
		}
		first, second := take("slow"), take("slow")
		var order []string
		later := func(ctx context.Context, kind, name string) {
			go func() {
				give, err := p.take(ctx, kind, quiet)
				if err != nil {
					order = append(order, fmt.Sprint(name, " left"))
					return
				}
				order = append(order, name)
				give()
			}()
			synctest.Wait()
		}
		ctx, leave := context.WithCancel(t.Context())
		later(ctx, "slow", "a")
		later(t.Context(), "slow", "b")
		later(t.Context(), "slow", "c")
		take("fast")()
		leave()
		synctest.Wait()
		second()
		synctest.Wait()
		first()
		first() // once
		if got := strings.Join(order, ", "); got != "a left, b, c" {
			t.Error(got)
		}
		give := []func(){take("x"), take("x"), take("y"), take("y")}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.take(short, "z", quiet); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("all places are taken, and there was one more: %v", err)
		}
		for _, g := range give {
			g()
		}
		if p.sum != 0 || len(p.used) != 0 || len(p.queue) != 0 {
			t.Errorf("%d places are in use, and %d wait", p.sum, len(p.queue))
		}
	})
}
