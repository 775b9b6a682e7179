package rpc

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"ingot/internal/host"
	"ingot/internal/pki"
)

// emptyHost has no microVMs, and takes none: what a request is refused for, it is
// refused for before that.
func emptyHost() Config {
	return Config{Listen: "127.0.0.1:9090", Host: host.New(host.Config{Bridge: "br0"}), Log: slog.New(slog.DiscardHandler), Version: "v1"}
}

const noUID = "01K0000000000000000000000A"

const goodSpec = `{"id":"one","kernel":{"image":"kernel","filename":"boot/vmlinux"},"rootVolume":{"id":"root","source":{"containerSource":"busybox"}},
	"interfaces":[{"deviceId":"eth1","type":"TAP"}]}`

func TestGateway(t *testing.T) {
	h := NewGateway(emptyHost(), "").handler()
	type object = map[string]any
	for _, tc := range []struct {
		request, body string
		header        string
		code          int
		want          any // all of it, or what the message begins with
	}{
		{request: "GET /v1alpha1/microvm/default", code: 200, want: object{"microvm": []any{}}},
		{request: "GET /v1alpha1/microvm/default?name=one", code: 200, want: object{"microvm": []any{}}},
		{request: "GET /v1alpha1/microvm/" + noUID, code: 404, want: "microvm spec " + noUID + " not found"},
		{request: "DELETE /v1alpha1/microvm/" + noUID, code: 404, want: "microvm spec " + noUID + " not found"},
		{request: "DELETE /v1alpha1/microvm/..%2f..%2fetc", code: 404, want: "microvm spec ../../etc not found"},
		{request: "POST /v1alpha1/microvm", body: goodSpec, code: 503, want: "create microVM default/one: the daemon is not ready"},
		{request: "POST /v1alpha1/microvm", body: strings.Replace(goodSpec, `"id":"one"`, `"id":"one","nextYears":1,"vcpu":99`, 1), code: 400, want: "vcpu: 99 is not between"},
		{request: "POST /v1alpha1/microvm", code: 400, want: `id: "" is not a name`},
		{request: "POST /v1alpha1/microvm", body: `{"vcpu":`, code: 400, want: "proto: "},
		{request: "POST /v1alpha1/microvm", body: `{"vcpu":"many"}`, code: 400, want: "proto: (line 1:9): invalid value for int32 field vcpu: \"many\""},
		{request: "POST /v1alpha1/microvm", body: "[\xff", code: 400, want: "proto: "},
		{request: "POST /v1alpha1/microvm", body: `{"id":"` + strings.Repeat("x", 17<<20) + `"}`, code: 400, want: "the body is larger than 16777216 bytes"},
		{request: "POST /microvm.services.api.v1alpha1.MicroVM/ListMicroVMsStream", body: `{}`, code: 400, want: "invalid request: namespace is required"},
		{request: "POST /microvm.services.api.v1alpha1.MicroVM/ListMicroVMsStream", body: `{"namespace":"default"}`, code: 200},
		{request: "POST /v1alpha1/microvm", header: "Origin: https://evil.example", body: goodSpec, code: 403, want: "a page of another origin"},
		{request: "PUT /v1alpha1/microvm", code: 501, want: "Method Not Allowed"},
		{request: "GET /v1alpha1/microvm", code: 501, want: "Method Not Allowed"},
		{request: "GET /microvm.services.api.v1alpha1.MicroVM/ListMicroVMsStream", code: 501, want: "Method Not Allowed"},
		{request: "GET /", code: 404, want: "Not Found"},
		{request: "GET /v1alpha1/microvm/a/b", code: 404, want: "Not Found"},
		{request: "POST /microvm.services.api.v1alpha1.MicroVM/DeleteMicroVM", code: 404, want: "Not Found"},
	} {
		method, path, _ := strings.Cut(tc.request, " ")
		r := httptest.NewRequest(method, path, strings.NewReader(tc.body))
		if key, value, ok := strings.Cut(tc.header, ": "); ok {
			r.Header.Set(key, value)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tc.code {
			t.Errorf("%s %.60s: status %d, want %d: %s", tc.request, tc.body, w.Code, tc.code, w.Body)
		}
		if tc.want == nil {
			continue
		}
		var got object
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Errorf("%s: %v in %q", tc.request, err, w.Body)
			continue
		}
		if text, ok := tc.want.(string); ok {
			message, _ := got["message"].(string)
			if _, isCode := got["code"].(float64); !isCode || !strings.HasPrefix(message, text) || got["details"] == nil || len(got) != 3 {
				t.Errorf("%s %.60s: got %v, want %q", tc.request, tc.body, got, text)
			}
		} else if a, b := asText(t, got), asText(t, tc.want); a != b {
			t.Errorf("%s: got %s, want %s", tc.request, a, b)
		}
	}
}

func asText(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestGatewayDoor: the same certificate, token and audit as for gRPC.
func TestGatewayDoor(t *testing.T) {
	dir := t.TempDir()
	ca, err := pki.OpenCA(filepath.Join(dir, "ca"), "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "operator"} {
		if _, err := ca.Ensure(filepath.Join(dir, name), name, nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")}); err != nil {
			t.Fatal(err)
		}
	}
	c := emptyHost()
	var log safeBuffer
	c.Token, c.Log, c.ExecAPI = "secret", slog.New(slog.NewTextHandler(&log, nil)), true
	shown, err := pki.In(filepath.Join(dir, "server")).Open(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	c.TLS = shown.Config()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := l.Addr().String()
	l.Close()
	g := NewGateway(c, listen)
	ctx, end := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := g.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { end(); serving.Wait() })
	<-g.Ready()
	client, err := pki.In(filepath.Join(dir, "operator")).Client()
	if err != nil {
		t.Fatal(err)
	}
	ask := func(config *tls.Config, method, path, authorization string) (int, string, error) {
		r, err := http.NewRequestWithContext(soon(t), method, "https://"+listen+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if authorization != "" {
			r.Header.Set("Authorization", authorization)
		}
		transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
		defer transport.CloseIdleConnections()
		answer, err := transport.RoundTrip(r)
		if err != nil {
			return 0, "", err
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		return answer.StatusCode, string(body), err
	}
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("secret"))
	for authorization, want := range map[string]int{"": 401, "Basic c2VjcmV0LW5vdA==": 401, basic: 200, "Bearer secret": 200, "Bearer no": 401} {
		if code, body, err := ask(client, "GET", "/v1alpha1/microvm/default", authorization); err != nil || code != want {
			t.Errorf("%q: %d %s, %v; want %d", authorization, code, body, err, want)
		}
	}
	stranger := client.Clone()
	stranger.Certificates = nil
	if code, body, err := ask(stranger, "GET", "/v1alpha1/microvm/default", basic); err == nil {
		t.Errorf("without a certificate: %d %s", code, body)
	}
	if code, body, err := ask(client, "DELETE", "/v1alpha1/microvm/"+noUID, basic); err != nil || code != 404 {
		t.Errorf("%d %s, %v", code, body, err)
	}
	if line := log.String(); !strings.Contains(line, "msg=audit method=/microvm.services.api.v1alpha1.MicroVM/DeleteMicroVM who=operator from=127.0.0.1:") || !strings.Contains(line, "target="+noUID) {
		t.Errorf("audit: %s", line)
	}
	// The port is that of gRPC.
	if code, body, err := ask(client, "POST", unbound("ServerInfo"), basic); err != nil || code != 200 || !strings.Contains(strings.ReplaceAll(body, " ", ""), `"exec":{"enabled":true,"address":"127.0.0.1:9090"}`) {
		t.Errorf("%d %s, %v", code, body, err)
	}
}

// safeBuffer may be written and read at the same time.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// FuzzGateway: whatever is asked for, there is an answer, and it is JSON with a code
// that fits its status.
func FuzzGateway(f *testing.F) {
	for _, r := range [][3]string{
		{"GET", "/v1alpha1/microvm/default", ""}, {"GET", "/v1alpha1/microvm/" + noUID + "?name=%ff", ""},
		{"DELETE", "/v1alpha1/microvm/%00", ""}, {"POST", "/v1alpha1/microvm", goodSpec}, {"POST", "/v1alpha1/microvm", `{"id":"\ud800"}`},
		{"POST", "/v1alpha1/microvm", `{"id":"x","metadata":{"meta-data":"JmEgWyphXQ=="},"createdAt":"2026-01-01T00:00:00Z","restartPolicy":9}`},
		{"POST", unbound("ListMicroVMsStream"), `{"namespace":"\u0000"}`}, {"POST", unbound("ServerInfo"), "{}"}, {"OPTIONS", "*", ""}, {"PUT", "//v1alpha1/../microvm", "["},
	} {
		f.Add(r[0], r[1], []byte(r[2]))
	}
	h := NewGateway(emptyHost(), "").handler()
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		r, err := http.ReadRequest(bufferedRequest(method, target, body))
		if err != nil {
			return // which net/http answers
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= 300 && w.Code < 400 || w.Code == 200 && w.Body.Len() == 0 || r.RequestURI == "*" {
			return // a cleaner path; an empty stream; net/http's own
		}
		var got struct {
			Code    *int   `json:"code"`
			Message string `json:"message"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Fatalf("%d %q: %v", w.Code, w.Body, err)
		}
		if (w.Code == 200) != (got.Code == nil) || w.Code == 500 {
			t.Errorf("status %d with %s", w.Code, w.Body)
		}
	})
}

// bufferedRequest is a request as it comes over the wire.
func bufferedRequest(method, target string, body []byte) *bufio.Reader {
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: host\r\nContent-Length: %d\r\n\r\n", method, target, len(body))
	return bufio.NewReader(io.MultiReader(strings.NewReader(head), bytes.NewReader(body)))
}
