package inspect

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestMetricsAreAsked(t *testing.T) {
	answer := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "# HELP ingot_build_info x\n# TYPE ingot_build_info gauge\ningot_build_info{version=\"1\"} 1\n")
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/metrics" {
			http.NotFound(w, r)
			return
		}
		answer(w, r)
	}))
	address := server.Listener.Addr().String()
	is := func(want Status, says string) {
		t.Helper()
		if f := checkMetrics(t.Context(), address); f.status != want || !strings.Contains(f.detail, says) {
			t.Errorf("%s: %s, not %s: %q", f.status, f.detail, want, says)
		}
	}
	is(Pass, "http://"+address+"/metrics")
	answer = func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "come again", http.StatusServiceUnavailable)
	}
	is(Fail, "503 Service Unavailable: come again")
	answer = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }
	is(Fail, "does not tell of Ingot")
	server.Close()
	is(Fail, "connection refused")
}
