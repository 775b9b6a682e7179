package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/link"
	"ingot/internal/need"
)

const metricsAddress = "127.0.0.1:9092"

// serveMetrics has the daemon serve metrics, and more of the configuration.
func (m *testMachine) serveMetrics(t *testing.T, more string) {
	t.Helper()
	m.reconfigure(t, more+"metrics-endpoint: "+metricsAddress+"\n")
	await(t, "metrics", func() bool {
		_, err := net.Dial("tcp", metricsAddress)
		return err == nil
	})
}

// getMetrics is an answer of the metrics' listener, and what it took.
func getMetrics(ctx context.Context, method, path string) (status int, text string, took time.Duration, err error) {
	began := time.Now()
	q, err := http.NewRequestWithContext(ctx, method, "http://"+metricsAddress+path, nil)
	if err != nil {
		return 0, "", 0, err
	}
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		return 0, "", 0, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), time.Since(began), err
}

// scrape is what the daemon tells now, as a program reads it.
func scrape(t *testing.T) (families map[string]*dto.MetricFamily, text string) {
	t.Helper()
	status, text, _, err := getMetrics(t.Context(), http.MethodGet, "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("scrape: %d, %v\n%.2000s", status, err, text)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	if families, err = parser.TextToMetricFamilies(strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	return families, text
}

// value is that of one metric, or the count of a histogram: the first that has these
// labels, name and value by turns. There may be none.
func value(families map[string]*dto.MetricFamily, name string, labels ...string) (_ float64, there bool) {
	for _, m := range families[name].GetMetric() {
		has := map[string]string{}
		for _, l := range m.Label {
			has[l.GetName()] = l.GetValue()
		}
		fits := true
		for i := 0; i < len(labels); i += 2 {
			fits = fits && has[labels[i]] == labels[i+1]
		}
		if fits {
			return m.GetGauge().GetValue() + m.GetCounter().GetValue() + m.GetUntyped().GetValue() + float64(m.GetHistogram().GetSampleCount()), true
		}
	}
	return 0, false
}

// TestMetrics has things happen to microVMs, and finds each of them in a scrape.
func TestMetrics(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	m.serveMetrics(t, "max-microvms: 10000\nenable-http: true\nhttp-endpoint: 127.0.0.1:8090\n")
	is := func(want float64, name string, labels ...string) {
		t.Helper()
		families, _ := scrape(t)
		if got, ok := value(families, name, labels...); !ok || got != want {
			t.Errorf("%s %q is %v (there: %v), not %v", name, labels, got, ok, want)
		}
	}
	some := func(name string, labels ...string) {
		t.Helper()
		families, _ := scrape(t)
		if got, ok := value(families, name, labels...); !ok || got <= 0 {
			t.Errorf("%s %q is %v (there: %v)", name, labels, got, ok)
		}
	}

	uid := m.create(t, "one")
	m.await(t, uid, "running")
	is(1, "ingot_microvms", "phase", "running")
	is(0, "ingot_microvms", "phase", "failed")
	is(1, "ingot_work_duration_seconds", "work", "create")
	for _, step := range []string{"record", "pull", "network", "boot"} {
		is(1, "ingot_step_duration_seconds", "work", "create", "step", step)
	}
	await(t, "the guest to be ready", func() bool {
		families, _ := scrape(t)
		n, _ := value(families, "ingot_step_duration_seconds", "work", "create", "step", "guest")
		return n == 1
	})
	is(1, "ingot_vcpus_committed")
	is(128<<20, "ingot_memory_committed_bytes")
	is(1, "ingot_microvms_committed")
	is(10000, "ingot_microvms_limit")
	is(1, "ingot_pool_up")
	for _, name := range []string{"ingot_vcpus", "ingot_vcpus_limit", "ingot_memory_bytes", "ingot_memory_limit_bytes", "ingot_pool_size_bytes", "ingot_pool_used_bytes", "ingot_pool_available_bytes", "ingot_pool_free_inodes", "ingot_boot_turns"} {
		some(name)
	}
	m.expectUsage(t, uid, is, some)

	// A hypervisor that is killed is started again.
	if err := syscall.Kill(int(m.status(t, uid).GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "the restart", func() bool { return m.status(t, uid).GetRestarts() == 1 && m.phase(t, uid) == "running" })
	is(1, "ingot_guest_exits_total", "cause", "killed")
	is(1, "ingot_guest_restarts_total")
	is(1, "ingot_microvm_restarts_total", "uid", uid, "namespace", "test", "name", "one")
	is(1, "ingot_step_duration_seconds", "work", "start", "step", "boot")
	is(1, "ingot_work_duration_seconds", "work", "create")

	// One without its bridge is tried again and again.
	bad := spec("bad")
	bad.Interfaces[0].Overrides = &types.NetworkOverrides{BridgeName: ptr("nobridge")}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: bad})
	if err != nil {
		t.Fatal(err)
	}
	await(t, "an error", func() bool {
		families, _ := scrape(t)
		n, _ := value(families, "ingot_reconcile_errors_total", "work", "create", "step", "network", "reason", "not_found")
		return n > 0
	})
	is(1, "ingot_queue_depth", "queue", "retry")
	is(0, "ingot_queue_depth", "queue", "turn")

	gets := []string{"grpc_service", "microvm.services.api.v1alpha1.MicroVM", "grpc_method", "GetMicroVM"}
	families, _ := scrape(t)
	before, _ := value(families, "grpc_server_handling_seconds", gets...)
	for range 3 {
		if _, err := m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: "01ARZ3NDEKTSV4RRFFQ69G5FAV"}); err == nil {
			t.Error("there is such a microVM")
		}
	}
	is(3, "grpc_server_handled_total", append(gets, "grpc_code", "NotFound")...)
	answer, err := http.Get("http://127.0.0.1:8090/v1alpha1/microvm/" + uid)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatal(answer, err)
	}
	answer.Body.Close()
	before++
	answer, err = http.Post("http://127.0.0.1:8090/microvm.services.api.v1alpha1.MicroVM/ListMicroVMsStream", "application/json", strings.NewReader("{}"))
	if err != nil || answer.StatusCode != http.StatusBadRequest { // there is no namespace in it
		t.Fatal(answer, err)
	}
	answer.Body.Close()
	is(1, "grpc_server_handled_total", "grpc_method", "ListMicroVMsStream", "grpc_code", "InvalidArgument")
	is(before+3, "grpc_server_handling_seconds", gets...)

	families, text := scrape(t)
	expectLint(t, text)
	expectDashboard(t, families)
	expectDocs(t, families)

	m.remove(t, uid)
	m.remove(t, r.Microvm.Spec.GetUid())
	await(t, "all to be gone", func() bool {
		families, text = scrape(t)
		deletes, _ := value(families, "ingot_work_duration_seconds", "work", "delete")
		return deletes == 2 && !strings.Contains(text, uid)
	})
	for _, step := range []string{"network", "images", "record"} {
		is(2, "ingot_step_duration_seconds", "work", "delete", "step", step)
	}
	is(2, "ingot_events_written_total", "kind", "deleted")
}

// expectUsage holds what is told of a microVM against the world.
func (m *testMachine) expectUsage(t *testing.T, uid string, is func(float64, string, ...string), some func(string, ...string)) {
	t.Helper()
	own := []string{"namespace", "test", "name", "one", "uid", uid}
	is(1, "ingot_microvm_vcpus", own...)
	is(128<<20, "ingot_microvm_memory_bytes", own...)
	status := m.status(t, uid)
	some("ingot_microvm_resident_memory_bytes", own...)
	some("ingot_microvm_start_time_seconds", own...)
	var volume unix.Stat_t
	if err := unix.Stat(status.Volumes["root"].GetMount().GetSource(), &volume); err != nil {
		t.Fatal(err)
	}
	root := append(slices.Clip(own), "volume", "root")
	is(float64(volume.Size), "ingot_microvm_volume_size_bytes", root...)
	is(float64(volume.Blocks*512), "ingot_microvm_volume_allocated_bytes", root...)
	families, _ := scrape(t)
	for _, name := range []string{"ingot_microvm_cpu_seconds_total", "ingot_microvm_storage_read_bytes_total", "ingot_microvm_storage_written_bytes_total"} {
		if _, ok := value(families, name, own...); !ok {
			t.Errorf("there is no %s", name)
		}
	}

	// The hollow hypervisor leaves its card alone: here the test is the guest.
	tap := cardOf(t, int(status.GetPid()), status.NetworkInterfaces["eth1"].GetHostDeviceName())
	defer unix.Close(tap)
	card := append(slices.Clip(own), "interface", "eth1")
	const sent, size = 7, 100
	frame := append(make([]byte, 10), bytes.Repeat([]byte{0xff}, 6)...) // the virtio-net header, and to everybody
	frame = append(append(frame, link.MAC(uid+"/eth1")...), 0x88, 0xb5)
	frame = append(frame, make([]byte, 10+size-len(frame))...)
	for range sent {
		if _, err := unix.Write(tap, frame); err != nil {
			t.Fatal(err)
		}
	}
	is(sent, "ingot_microvm_network_transmit_packets_total", card...)
	is(sent*size, "ingot_microvm_network_transmit_bytes_total", card...)
	is(0, "ingot_microvm_network_receive_packets_total", card...)
	if err := link.EnsureAddress("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("udp", "10.77.0.9:9"); err != nil { // whose MAC the host asks for
		t.Error(err)
	} else {
		c.Write([]byte("x"))
		c.Close()
	}
	heard := []unix.PollFd{{Fd: int32(tap), Events: unix.POLLIN}}
	if n, err := unix.Poll(heard, 10000); n != 1 || err != nil {
		t.Fatalf("the guest hears nothing: %v", err)
	}
	n, err := unix.Read(tap, make([]byte, 2000))
	if err != nil {
		t.Fatal(err)
	}
	is(1, "ingot_microvm_network_receive_packets_total", card...)
	is(float64(n-10), "ingot_microvm_network_receive_bytes_total", card...)
}

// cardOf is the open tap that a hypervisor has.
func cardOf(t *testing.T, pid int, device string) int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		info, _ := os.ReadFile(path)
		if !strings.Contains(string(info), "iff:\t"+device+"\n") {
			continue
		}
		process, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(process)
		n, _ := strconv.Atoi(filepath.Base(path))
		fd, err := unix.PidfdGetfd(process, n, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	t.Fatalf("%d has no %s", pid, device)
	return -1
}

// expectLint has Prometheus's own rules for names and helps.
func expectLint(t *testing.T, text string) {
	t.Helper()
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("promlint: %s: %s", p.Metric, p.Text)
	}
}

// expectDashboard finds each metric that the dashboard names in a scrape, and nothing
// in it that Grafana would not know.
func expectDashboard(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	b, err := os.ReadFile("../../docs/grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		UID    string `json:"uid"`
		Title  string `json:"title"`
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
		Templating struct {
			List []struct {
				Name  string          `json:"name"`
				Query json.RawMessage `json:"query"`
			} `json:"list"`
		} `json:"templating"`
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	var asked []string
	for _, v := range d.Templating.List {
		asked = append(asked, string(v.Query))
	}
	ids := map[int]bool{}
	for _, p := range d.Panels {
		if p.Type != "row" && len(p.Targets) == 0 || p.Title == "" || ids[p.ID] {
			t.Errorf("panel %d %q has no query, no title or another's number", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, q := range p.Targets {
			asked = append(asked, q.Expr)
		}
	}
	if len(d.Panels) == 0 || d.UID == "" {
		t.Error("the dashboard is empty")
	}
	expectNames(t, "the dashboard", strings.Join(asked, "\n"), families)
}

// expectDocs finds each metric that the page names in a scrape, and all of ours in the
// page.
func expectDocs(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	expectNames(t, "docs/metrics.md", string(b), families)
	for name := range families {
		if strings.HasPrefix(name, "ingot_") && !strings.Contains(string(b), "`"+name) {
			t.Errorf("docs/metrics.md says nothing of %s", name)
		}
	}
}

func expectNames(t *testing.T, where, text string, families map[string]*dto.MetricFamily) {
	t.Helper()
	names := map[string]bool{}
	for _, name := range regexp.MustCompile(`\b(ingot|grpc_server|process|go)_[a-z0-9_]+\b`).FindAllString(text, -1) {
		if !strings.HasPrefix(name, "ingot_hub_") { // those are another daemon's: TestHubMetrics
			names[name] = true
		}
	}
	if len(names) < 10 {
		t.Errorf("%s names %d metrics only", where, len(names))
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		base := name
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			if f := families[strings.TrimSuffix(name, suffix)]; f.GetType() == dto.MetricType_HISTOGRAM {
				base = strings.TrimSuffix(name, suffix)
			}
		}
		if families[base] == nil {
			t.Errorf("%s names %s, which no scrape has", where, name)
		}
	}
}

// TestMetricsListener: it answers what it should, and nothing else.
func TestMetricsListener(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	if _, err := net.Dial("tcp", metricsAddress); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody asked for metrics: %v", err)
	}
	m.serveMetrics(t, "")
	for request, want := range map[string]int{
		"GET /metrics": 200, "HEAD /metrics": 200, "POST /metrics": 405, "DELETE /metrics": 405,
		"GET /": 404, "GET /debug/pprof/": 404, "GET /metrics/x": 404,
	} {
		method, path, _ := strings.Cut(request, " ")
		if status, text, _, err := getMetrics(t.Context(), method, path); err != nil || status != want {
			t.Errorf("%s: %d, %v: %.200s", request, status, err, text)
		}
	}
	// Who connects and says nothing is not waited for, and keeps nobody out.
	var silent []net.Conn
	for range 100 {
		c, err := net.Dial("tcp", metricsAddress)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	await(t, "the silent to be shown out", func() bool {
		status, _, _, err := getMetrics(t.Context(), http.MethodGet, "/metrics")
		return err == nil && status == http.StatusOK
	})
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("one that says nothing is still connected")
		}
	}
	// Many scrapes at once are answered, or told to come again.
	var asking sync.WaitGroup
	for range 12 {
		asking.Go(func() {
			status, _, _, err := getMetrics(t.Context(), http.MethodGet, "/metrics")
			if err != nil || status != http.StatusOK && status != http.StatusServiceUnavailable {
				t.Errorf("one of many: %d, %v", status, err)
			}
		})
	}
	asking.Wait()
	if _, err := m.host.Facts(t.Context(), &emptypb.Empty{}); err != nil {
		t.Error(err)
	}

	// Flintlock has them beside the profiles.
	m.reconfigure(t, "debug-endpoint: "+metricsAddress+"\n")
	for path, want := range map[string]string{"/metrics": "\ningot_microvms{", "/debug/pprof/cmdline": "host"} {
		if status, text, _, err := getMetrics(t.Context(), http.MethodGet, path); err != nil || status != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("the debug endpoint's %s: %d, %v: %.200s", path, status, err, text)
		}
	}
}

// TestScrapeOfMany measures what a scrape of many microVMs takes, and whether calls
// wait for it.
func TestScrapeOfMany(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	m.serveMetrics(t, "memory-overcommit: 0\nvcpu-overcommit: 0\n")
	uids := m.createMany(t, *many)
	call := func() time.Duration {
		began := time.Now()
		if _, err := m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: uids[0]}); err != nil {
			t.Error(err)
		}
		return time.Since(began)
	}
	size := 0
	look := func() time.Duration {
		status, text, took, err := getMetrics(t.Context(), http.MethodGet, "/metrics")
		if n := strings.Count(text, "\ningot_microvm_cpu_seconds_total{"); err != nil || status != http.StatusOK || n != *many {
			t.Errorf("%d, %v: %d microVMs", status, err, n)
		}
		size = len(text)
		return took
	}
	before := m.usage(t)
	scrapes, calls := repeat(20, look), repeat(200, call)
	ctx, stop := context.WithCancel(t.Context())
	var calling sync.WaitGroup
	var beside []time.Duration
	calling.Go(func() {
		for ctx.Err() == nil {
			beside = append(beside, call())
		}
	})
	busy := repeat(20, look)
	stop()
	calling.Wait()
	slices.Sort(beside)
	after := m.usage(t)
	t.Logf("a scrape of %d microVMs, %d KiB: p50 %v, p95 %v; beside calls one after the other p50 %v, p95 %v",
		*many, size>>10, centile(scrapes, 50), centile(scrapes, 95), centile(busy, 50), centile(busy, 95))
	t.Logf("a call: p50 %v, p99 %v; beside scrapes one after the other p50 %v, p99 %v", centile(calls, 50), centile(calls, 99), centile(beside, 50), centile(beside, 99))
	t.Logf("the daemon: %d KiB of anonymous memory before, %d after, %d threads", before.memory, after.memory, after.threads)
	if p50 := centile(scrapes, 50); p50 > 200*time.Millisecond {
		t.Errorf("a scrape takes %v", p50)
	}
	if p50 := centile(beside, 50); p50 > 20*time.Millisecond {
		t.Errorf("a call waits for a scrape: %v", p50)
	}
}

// repeat measures something several times, the quickest first.
func repeat(times int, measure func() time.Duration) []time.Duration {
	var all []time.Duration
	for range times {
		all = append(all, measure())
	}
	slices.Sort(all)
	return all
}

// Guests are kept from the metrics of their host.
func TestMetricsPort(t *testing.T) {
	c := defaultHostConfig()
	c.GRPCEndpoint = "192.168.10.3:9090"
	for endpoint, want := range map[string][]uint16{"": {9090}, "192.168.10.3:9092": {9090, 9092}} {
		c.MetricsEndpoint = endpoint
		if got, err := c.ports(); err != nil || !slices.Equal(got, want) {
			t.Errorf("metrics at %q: %v, %v, want %v", endpoint, got, err, want)
		}
	}
}
