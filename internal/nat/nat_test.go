package nat_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/need"
	"ingot/internal/tests"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestMain has /sys and /run know of the tests' own network namespace.
func TestMain(m *testing.M) {
	tests.Apart(m, tests.Fresh("sysfs", "/sys"), tests.Fresh("tmpfs", "/run"))
}

var (
	platform = []netip.Addr{netip.MustParseAddr("192.168.10.3"), netip.MustParseAddr("192.168.10.2")}
	hub      = nat.Hub{
		Inside: "bond0.1000", Outside: "bond0", Trusted: netip.MustParsePrefix("100.64.0.0/30"),
		Platform: platform, Management: []uint16{9091}, Segment: netip.MustParsePrefix("192.168.10.0/25"),
	}
)

// changing are elements that have a time.
var changing = regexp.MustCompile(`\n\t\telements = [^\n]* expires [^}]*}`)

func golden(t *testing.T, name, family, table string) {
	t.Helper()
	out, err := exec.Command("nft", "list", "table", family, table).CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	out = changing.ReplaceAll(out, nil)
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, out, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(out)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func needs(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "nft")
}

func TestHub(t *testing.T) {
	needs(t)
	for range 2 { // twice changes nothing
		if err := nat.SetHub(hub); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "hub.nft", "ip", nat.Table)
	if err := nat.Remove(nat.Table); err != nil {
		t.Fatal(err)
	}
	if there, err := nat.Present(nat.Table); err != nil || there {
		t.Errorf("after Remove: present %v, %v", there, err)
	}
}

func TestCheckHubNamesWhatIsMissing(t *testing.T) {
	needs(t)
	const (
		forward    = "ipv4 filter FORWARD 0 -i bond0.1000 -o bond0 -j ACCEPT"
		masquerade = "ipv4 nat POSTROUTING 0 -o bond0 -j MASQUERADE"
	)
	in := []nat.Rule{{Text: forward, Present: true}, {Text: masquerade, Present: true}}
	for _, c := range []struct {
		nft  string
		want []nat.Rule
	}{
		{"add table ip other", in},
		{"flush chain ip ingot postrouting", []nat.Rule{{Text: forward, Present: true}, {Text: masquerade}, {Text: "postrouting: the segment's own ways to published ports"}}},
		{"chain ip ingot forward { policy accept; }", append(in, nat.Rule{Text: "chain forward as it was made, with no other rules"})},
		{"insert rule ip ingot input accept", append(in, nat.Rule{Text: "chain input as it was made, with no other rules"})},
		{"add element ip ingot platform { 192.168.10.99 }", append(in, nat.Rule{Text: "set platform"})},
	} {
		if err := nat.SetHub(hub); err != nil {
			t.Fatal(err)
		}
		exec.Command("nft", c.nft).Run()
		got, err := nat.CheckHub(hub)
		if err != nil {
			t.Fatal(err)
		}
		less := func(a, b nat.Rule) int { return strings.Compare(a.Text, b.Text) }
		want := slices.SortedFunc(slices.Values(c.want), less)
		if diff := cmp.Diff(want, slices.SortedFunc(slices.Values(got), less)); diff != "" {
			t.Errorf("after nft %s (-want +got):\n%s", c.nft, diff)
		}
	}
	// Each rule that is away is named, and no other.
	count := 0
	for _, chain := range []string{"forward", "input"} {
		if err := nat.SetHub(hub); err != nil {
			t.Fatal(err)
		}
		exec.Command("nft", "flush chain ip ingot "+chain).Run()
		got, err := nat.CheckHub(hub)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range got {
			if !r.Present {
				count++
			}
		}
	}
	if count != 5+9 {
		t.Errorf("%d rules are said to be missing", count)
	}
	if err := nat.Remove(nat.Table); err != nil {
		t.Fatal(err)
	}
	if got, err := nat.CheckHub(hub); err != nil || slices.ContainsFunc(got, func(r nat.Rule) bool { return r.Present }) {
		t.Errorf("without a table: %v, %v", got, err)
	}
}

func TestHubWithoutTrusted(t *testing.T) {
	needs(t)
	h := hub
	h.Trusted = netip.Prefix{}
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nft", "list", "table", "ip", nat.Table).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("trusted")) {
		t.Errorf("%v\n%s", err, out)
	}
}

func exampleHost() nat.Host {
	return nat.Host{
		Segment: "bond0.1000", MAC: link.MAC("test"), Bridge: "ingot0", Port: "seg0",
		Platform: platform, Hub: netip.MustParseAddr("192.168.10.2"), Trusted: netip.MustParsePrefix("100.64.0.0/30"), Management: []uint16{9090, 9092},
	}
}

func TestHost(t *testing.T) {
	needs(t)
	for range 2 {
		g, err := nat.OpenGuard(exampleHost())
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Set("fltap0000001", nat.Guest{MAC: link.MAC("guest")}); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "host.nft", "inet", nat.Table)
	golden(t, "host-bridge.nft", "bridge", nat.Table)
}

func TestLab(t *testing.T) {
	needs(t)
	l := nat.Lab{Table: "ingot-test", Uplink: "ingot-test", Subnet: netip.MustParsePrefix("100.64.0.0/30")}
	for range 2 {
		if err := nat.SetLab(l); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "lab.nft", "ip", "ingot-test")
	if missing, err := nat.CheckLab(l); err != nil || len(missing) > 0 {
		t.Errorf("missing %v, %v", missing, err)
	}
	nft(t, "flush chain ip ingot-test forward")
	missing, err := nat.CheckLab(l)
	if diff := cmp.Diff([]string{"forward: answers", "forward: nobody else in"}, missing); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// Docker and ufw leave a chain like this one.
func TestPassageThroughAnothersDrop(t *testing.T) {
	needs(t)
	nft(t, "table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; chain DOCKER-USER {}; }")
	nft(t, "table inet other { chain forward { type filter hook forward priority filter; policy accept; }; }")
	for i, want := range []int{1, 0} { // twice changes nothing
		added, err := nat.SetPassage("ingot-lab")
		if err != nil || len(added) != want {
			t.Fatalf("time %d: %v, %v", i, added, err)
		}
	}
	golden(t, "passage.nft", "ip", "filter")
	// One of the two rules is away, or is there twice.
	const accept = ` counter accept comment "ingot: let pass ingot-lab"`
	for _, script := range []string{
		"flush chain ip filter FORWARD; add rule ip filter FORWARD oifname ingot-lab" + accept,
		"add rule ip filter FORWARD iifname ingot-lab" + accept,
		"flush chain ip filter FORWARD; add rule ip filter FORWARD iifname ingot-lab" + accept + "; add rule ip filter FORWARD iifname ingot-lab" + accept,
	} {
		nft(t, script)
		if added, err := nat.SetPassage("ingot-lab"); err != nil || len(added) != 1 {
			t.Fatalf("after %s: %v, %v", script, added, err)
		}
		golden(t, "passage.nft", "ip", "filter")
	}
	if err := nat.RemovePassage("ingot-lab"); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nft", "list", "chain", "ip", "filter", "FORWARD").Output()
	if err != nil || bytes.Contains(out, []byte("ingot")) {
		t.Errorf("left behind: %v\n%s", err, out)
	}
}

// TestGuardKeeps: what keeps guests out is back at once, whoever takes it away.
func TestGuardKeeps(t *testing.T) {
	needs(t)
	g, err := nat.OpenGuard(exampleHost())
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set("fltap0000001", nat.Guest{MAC: link.MAC("guest")}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	restored, done := make(chan bool), make(chan error)
	go func() { done <- g.Keep(ctx, func() { restored <- true }, func([]nat.Refusal) {}) }()
	for _, command := range []string{
		"flush ruleset",
		"delete table bridge ingot",
		"flush chain inet ingot input",
		"insert rule inet ingot input accept",
		"delete element inet ingot platform { 192.168.10.2 }",
		"flush set bridge ingot guests",
		"chain inet ingot prerouting { policy drop; }",
		"add table inet ingot { flags dormant; }",
	} {
		if out, err := exec.Command("nft", command).CombinedOutput(); err != nil {
			t.Fatalf("nft %v: %v\n%s", command, err, out)
		}
		select {
		case <-restored:
		case <-time.After(10 * time.Second):
			t.Fatalf("after nft %v: the tables were not set again", command)
		}
		golden(t, "host.nft", "inet", nat.Table)
		golden(t, "host-bridge.nft", "bridge", nat.Table)
	}
	// Another's table is another's business, and so is a guest that comes.
	if out, err := exec.Command("nft", "add table inet other").CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	if err := g.Set("fltap0000002", nat.Guest{MAC: link.MAC("other")}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-restored:
		t.Error("the tables were set again, and nobody had changed them")
	case <-time.After(100 * time.Millisecond):
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestGuardDoesNotLookAtItself: what it changes itself it need not look at.
func TestGuardDoesNotLookAtItself(t *testing.T) {
	needs(t)
	g, err := nat.OpenGuard(exampleHost())
	if err != nil {
		t.Fatal(err)
	}
	defer nat.Remove(nat.Table)
	ctx, stop := context.WithCancel(t.Context())
	looked, done := make(chan bool, 1000), make(chan error)
	go func() { done <- g.Keep(ctx, func() {}, func([]nat.Refusal) { looked <- true }) }()
	<-looked
	const guests = 100
	for i := range guests {
		if err := g.Set(fmt.Sprintf("fltap%07d", i), nat.Guest{MAC: link.MAC(fmt.Sprint(i))}); err != nil {
			t.Fatal(err)
		}
	}
	before := len(looked)
	nft(t, "add table inet another; delete table inet another")
	select {
	case <-looked:
	case <-time.After(5 * time.Second):
		t.Error("it does not look at what others change")
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if before > guests/2 { // some threads may have ended
		t.Errorf("it looked %d times, while %d guests came", before, guests)
	}
}
