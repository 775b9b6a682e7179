package main

import (
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"ingot/internal/need"
)

const hubMetrics = hubAddress + ":9093"

// TestHubMetrics has things happen to a hub, and finds each of them in a scrape.
func TestHubMetrics(t *testing.T) {
	need.Binary(t, "busybox")
	if !onMachine(t) {
		return
	}
	s := newSegment(t)
	config, err := os.ReadFile(s.dir + "/hub.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(config), "range-last: 192.168.10.126", "range-last: 192.168.10.27", 1) +
		"metrics-endpoint: " + hubMetrics + "\nvpn: {subnet: 10.91.0.0/24, port: 51820, endpoint: \"hub.example.org:51820\"}\n"
	if err := os.WriteFile(s.dir+"/hub.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h := s.start(t, 0)
	defer h.kill()
	if err := h.serves(); err != nil {
		t.Fatal(err)
	}
	is := func(want float64, name string, labels ...string) {
		t.Helper()
		if got, ok := value(h.scrape(t), name, labels...); !ok || got != want {
			t.Errorf("%s %q is %v (there: %v), not %v", name, labels, got, ok, want)
		}
	}
	is(2, "ingot_hub_dhcp_free_addresses")
	for _, part := range []string{"dhcp", "dns", "registry"} {
		is(1, "ingot_hub_part_up", "part", part)
	}
	p := promises{}
	for i := range 2 {
		if _, err := h.bind(p, i); err != nil {
			t.Fatal(err)
		}
	}
	is(2, "ingot_hub_dhcp_leases", "state", "active")
	is(0, "ingot_hub_dhcp_leases", "state", "declined")
	is(0, "ingot_hub_dhcp_free_addresses")
	is(2, "ingot_hub_dhcp_sent_total", "type", "ack")
	is(2, "ingot_hub_dhcp_received_total", "type", "request")
	is(4, "ingot_hub_dhcp_answer_seconds") // two offers, two ACKs
	is(0, "ingot_hub_dhcp_exhausted_total")
	// Nothing is left for the third: a line in the log, and a number.
	exec.Command("ip", "netns", "exec", "g2", "busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "2", "-T", "1", "-s", "/bin/true").Run()
	is(2, "ingot_hub_dhcp_exhausted_total")
	if log := h.log.String(); strings.Count(log, "no free address is left") != 1 || !strings.Contains(log, "subnet=192.168.10.0/25") {
		t.Errorf("its log says of that\n%s", log)
	}
	for range 2 {
		sh(t, "ip netns exec g0 busybox nslookup -type=a box-1.lab.internal "+hubAddress)
	}
	is(2, "ingot_hub_dns_answers_total", "from", "environment")
	is(0, "ingot_hub_dns_answers_total", "from", "upstream")
	is(1, "ingot_hub_nat_forwarding")
	is(0, "ingot_hub_nat_rules_missing")
	is(0, "ingot_hub_dhcp_foreign_servers")
	sh(t, "nft flush ruleset")
	families := h.scrape(t)
	if got, _ := value(families, "ingot_hub_nat_rules_missing"); got < 2 {
		t.Errorf("without rules, %v are missing", got)
	}
	expectHubDocs(t, families)
}

// TestHubMetricsReach: the machines reach them, guests do not, nor does anybody where no
// key says where.
func TestHubMetricsReach(t *testing.T) {
	need.Binary(t, "busybox")
	if !onMachine(t) {
		return
	}
	s := newSegment(t)
	h := s.start(t, 0)
	if err := h.serves(); err != nil {
		t.Fatal(err)
	}
	if r, err := http.Get("http://" + hubMetrics + "/metrics"); err == nil {
		r.Body.Close()
		t.Error("it serves metrics, and nobody said where")
	}
	h.kill()
	f, err := os.OpenFile(s.dir+"/hub.yaml", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("metrics-endpoint: " + hubMetrics + "\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	h = s.start(t, 0)
	defer h.kill()
	if err := h.serves(); err != nil {
		t.Fatal(err)
	}
	h.scrape(t)
	sh(t, "ip -n g0 addr add 192.168.10.3/25 dev eth0; ip -n g1 addr add 192.168.10.30/25 dev eth0")
	sh(t, "ip netns exec g0 busybox nc -w 3 "+hubAddress+" 9093 -e true")
	if out, err := exec.Command("ip", "netns", "exec", "g1", "busybox", "nc", "-w", "1", hubAddress, "9093", "-e", "true").CombinedOutput(); err == nil {
		t.Errorf("a guest reaches them: %s", out)
	}
	for path, want := range map[string]int{"/": 404, "/debug/pprof/": 404} {
		r, err := http.Get("http://" + hubMetrics + path)
		if err != nil {
			t.Fatal(err)
		}
		if r.Body.Close(); r.StatusCode != want {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
}

func (h *hubProcess) scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	var text []byte
	await(t, "metrics", func() bool {
		r, err := http.Get("http://" + hubMetrics + "/metrics")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		if text, err = io.ReadAll(r.Body); err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("scrape: %s, %v\n%.2000s", r.Status, err, text)
		}
		return true
	})
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	expectLint(t, string(text))
	return families
}

// expectHubDocs finds each of the hub's metrics that the page and the dashboard name in
// a scrape, and all of ours in the page.
func expectHubDocs(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	for _, file := range []string{"metrics.md", "grafana-dashboard.json"} {
		b, err := os.ReadFile("../../docs/" + file)
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for _, name := range regexp.MustCompile(`\bingot_hub_[a-z0-9_]+\b`).FindAllString(string(b), -1) {
			names[name] = true
		}
		for _, name := range slices.Sorted(maps.Keys(names)) {
			// A peer that is not there has no numbers.
			if families[strings.TrimSuffix(name, "_bucket")] == nil && !strings.HasPrefix(name, "ingot_hub_vpn_peer_") && !strings.HasPrefix(name, "ingot_hub_nat_connections") {
				t.Errorf("docs/%s names %s, which no scrape has", file, name)
			}
		}
		for name := range families {
			if file == "metrics.md" && strings.HasPrefix(name, "ingot_hub_") && !names[name] {
				t.Errorf("docs/metrics.md says nothing of %s", name)
			}
		}
	}
}
