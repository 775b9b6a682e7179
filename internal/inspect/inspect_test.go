package inspect

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestGreen(t *testing.T) {
	r := Run(t.Context(), green(t, 1).env)
	if !r.OK || len(r.Findings()) > 0 {
		t.Fatalf("not green: %s", strings.Join(r.Findings(), "\n"))
	}
	for _, style := range []struct {
		golden string
		Style
	}{{"testdata/green.txt", Style{}}, {"testdata/green-v.txt", Style{Notes: true}}} {
		var b strings.Builder
		if err := r.Text(&b, style.Style); err != nil {
			t.Fatal(err)
		}
		golden(t, style.golden, steady(b.String()))
	}
}

// steady takes out of a text what is another each time.
func steady(s string) string {
	for _, r := range []struct{ from, to string }{
		{`(answers|reached \S+) in \d+\.\d ms`, "$1 in 1.0 ms"},
		{`in \d+\.\d\d s\n`, "in 0.01 s\n"},
		{`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`, "2026-01-02 03:04:05"},
		{`running for 1m\d\ds`, "running for 1m30s"},
	} {
		s = regexp.MustCompile(r.from).ReplaceAllString(s, r.to)
	}
	return s
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-update writes it anew): %s", file, diff)
	}
}

// TestFindings breaks one thing at a time: the report must name it, and nothing else.
func TestFindings(t *testing.T) {
	const vm = "host-0 > microVMs > default/vm-0-0"
	for _, c := range []struct {
		name string
		ruin func(w *world)
		want []string
	}{
		{"a NAT rule is gone", func(w *world) { w.hub.facts.Nat.Rules[1].Present = false },
			[]string{"fail: network-hub > NAT > " + masqueradeRule + ": not in force; `ingot up` sets it again"}},
		{"a NAT rule is only missing", func(w *world) {
			w.hub.facts.Nat.Rules, w.hub.facts.Nat.Missing = w.hub.facts.Nat.Rules[1:], []string{forwardRule}
		}, []string{"fail: network-hub > NAT > " + forwardRule + ": not in force; `ingot up` sets it again"}},
		{"no forwarding", func(w *world) { w.hub.facts.Nat.Forwarding = false },
			[]string{"fail: network-hub > NAT > forwarding: the kernel does not forward between bond0.1000 and bond0; `ingot up` sets it again"}},
		{"the DHCP server has stopped", func(w *world) { w.hub.facts.Dhcp.Serving, w.hub.facts.Dhcp.Error = false, "listen: address in use" },
			[]string{"fail: network-hub > DHCP server: does not serve: listen: address in use"}},
		{"another DHCP server, and not enough addresses", func(w *world) {
			d := w.hub.facts.Dhcp
			d.Foreign = []*v1.ForeignDHCP{{Server: "192.168.10.77", Mac: "02:00:00:00:00:77", Offers: "192.168.10.200"}}
			d.Conflicts, d.SinceConflict = 2, durationpb.New(time.Hour) // long ago
			d.Exhausted, d.SinceExhausted = 3, durationpb.New(5*time.Second)
		}, []string{"warn: network-hub > DHCP server: another DHCP server is on the segment: 192.168.10.77 at 02:00:00:00:00:77, " +
			"which offers 192.168.10.200; no address was free for a client 5s ago, 3 times so far; 192.168.10.26-192.168.10.126 on bond0.1000, 2 active, 99 free"}},
		{"two cards with one address", func(w *world) {
			w.hub.facts.Dhcp.Conflicts, w.hub.facts.Dhcp.SinceConflict = 1, durationpb.New(time.Minute)
		}, []string{"warn: network-hub > DHCP server: an address was found in use by another card 1m0s ago, 1 time so far; " +
			"192.168.10.26-192.168.10.126 on bond0.1000, 2 active, 99 free"}},
		{"the wrong address", func(w *world) { w.hub.facts.Interfaces[0].Addresses = []string{"192.168.10.9/25"} },
			[]string{"fail: network-hub > address: bond0.1000 has 192.168.10.9/25, not 192.168.10.2"}},
		{"the uplink is down", func(w *world) { w.hub.facts.Interfaces[1].Up = false }, []string{"fail: network-hub > uplink: bond0 is down"}},
		{"no DNS", func(w *world) { w.hub.facts.Dns.Serving = false }, []string{"fail: network-hub > DNS: does not serve: it is not running"}},
		{"a host that the hub does not hear", func(w *world) {
			w.hub.facts.Hosts[1] = &v1.HeardHost{Name: "host-1", Silent: durationpb.New(3 * time.Minute), Error: "connection refused", Microvms: 2}
		}, []string{"warn: network-hub > microVMs: host-1 is not heard for 3m0s, and has 2 microVMs as it had then: connection refused"}},
		{"no registry", func(w *world) { w.hub.facts.Registry.Serving = false }, []string{"fail: network-hub > registry: does not serve: it is not running"}},
		{"no containerd", func(w *world) {
			w.hosts[1].facts.Containerd.Serving, w.hosts[1].facts.Containerd.Error = false, "connection refused"
		}, []string{"fail: host-1 > containerd: /run/containerd/containerd.sock does not answer: connection refused"}},
		{"ranges without an address", func(w *world) {
			d := w.hub.facts.Dhcp
			d.Free, d.Ranges = 0, []string{"192.168.10.10-192.168.10.12", "192.168.10.26-192.168.10.30", "10.7.0.10-10.7.0.20", "10.8.0.1-10.8.0.2"}
			w.hub.leases = append(w.hub.leases, &v1.Lease{Ip: "192.168.10.60", ClientId: []byte{1, 2}, State: "reserved", Reserved: true})
		}, []string{"fail: network-hub > DHCP server > leases: no address is free: 2 in /var/lib/dhcp/dhcpd.leases, 1 address kept for a client"}},
		{"a lease is gone", func(w *world) { w.hosts[0].facts.Containerd.LeaseIds = nil },
			[]string{"fail: host-0 > containerd > leases: nothing holds the volumes of: flintlock/default/vm-0-0/01Kvm-0-0"}},
		{"the pool is full", func(w *world) { w.hosts[0].facts.Pool.Full = "10 MiB are left" },
			[]string{"fail: host-0 > pool: full: 10 MiB are left"}},
		{"the pool is nearly full", func(w *world) { w.hosts[0].facts.Pool.Low = "900 MiB are left" },
			[]string{"warn: host-0 > pool: nearly full: 900 MiB are left: loop at /var/lib/containerd/pool, 10 % of 10.0 GiB in use"}},
		{"the pool copies", func(w *world) { w.hosts[0].facts.Pool.Reflink = false },
			[]string{"fail: host-0 > pool: cannot share blocks: loop at /var/lib/containerd/pool, 10 % of 10.0 GiB in use"}},
		{"nearly all is promised", func(w *world) {
			f := w.hosts[0].facts
			f.MicrovmsLimit, f.MicrovmsCommitted, f.MemoryCommittedBytes = 100, 89, f.MemoryLimitBytes*9/10+1
		}, []string{"warn: host-0 > limits: nearly all that microVMs may be promised is: 6.3 GiB of 7.0 GiB"}},
		{"a broken record", func(w *world) {
			w.hosts[0].facts.BrokenRecords = []*v1.RecordFacts{{Path: "/s/vm/a/b/c/vm.json", Error: "unexpected end"}}
		}, []string{"fail: host-0 > records: left as they are: /s/vm/a/b/c/vm.json: unexpected end. Mend the file, or remove it to have it made anew from containerd's copy; then restart flintlockd"}},
		{"no driver", func(w *world) {
			w.hosts[0].facts.Drivers[0].Available, w.hosts[0].facts.Drivers[0].Reason = false, "there is no qemu-system-x86_64"
		}, []string{"fail: host-0 > driver: no driver can be used: qemu: there is no qemu-system-x86_64"}},
		{"a stray tap", func(w *world) { w.hosts[0].facts.Interfaces[1].VmUid = "" },
			[]string{"warn: host-0 > interfaces: no microVM's: fltap0vm-0-0"}},
		{"a VMM was killed", func(w *world) {
			st := w.hosts[0].vms[0].Status
			st.Phase, st.Pid, st.Restarts, st.AgentReady, st.Addresses = "pending", 0, 1, false, nil
			st.LastCrashAt, st.LastCrashReason = timestamppb.New(time.Now().Add(-2500*time.Millisecond)), "signal: killed"
			st.RetryAt = timestamppb.New(time.Now().Add(4900 * time.Millisecond))
		}, []string{"fail: " + vm + ": pending: it crashed 2s ago (signal: killed); next try in 4s"}},
		{"and was started again", func(w *world) {
			st := w.hosts[0].vms[0].Status
			st.Restarts, st.LastCrashAt, st.LastCrashReason = 1, timestamppb.New(time.Now().Add(-9*time.Minute-500*time.Millisecond)), "signal: killed"
		}, []string{"warn: " + vm + " > process: it crashed 9m0s ago (signal: killed) and was started again, 1 restart in all; now qemu with tcg, process 4026"}},
		{"which is forgotten after ten minutes", func(w *world) {
			st := w.hosts[0].vms[0].Status
			st.Restarts, st.LastCrashAt = 1, timestamppb.New(time.Now().Add(-10*time.Minute))
		}, nil},
		{"stopped on request", func(w *world) {
			st := w.hosts[0].vms[0].Status
			st.Phase, st.Pid, st.AgentReady = "stopped", 0, false
		}, nil},
		{"it cannot start", func(w *world) {
			st := w.hosts[0].vms[0].Status
			st.Phase, st.Reason = "failed", "pull nosuch: not found"
		}, []string{"fail: " + vm + ": failed: pull nosuch: not found"}},
		{"a file is gone", func(w *world) { w.hosts[0].missing = []string{"metrics"} },
			[]string{"fail: " + vm + " > files: qemu.metrics: open metrics: no such file"}},
		{"an address is refused", func(w *world) {
			w.hosts[0].vms[0].Status.Conditions = []*types.Condition{{Type: "AddressesAllowed", Status: "False", Message: "eth1 sends from 10.0.0.7 (3 packets): dropped"}}
		}, []string{"warn: " + vm + " > interfaces: eth1 sends from 10.0.0.7 (3 packets): dropped"}},
		{"a tap is gone", func(w *world) { w.hosts[0].facts.Interfaces = w.hosts[0].facts.Interfaces[:2] },
			[]string{"fail: " + vm + " > interfaces: eth1: its device fltap1vm-0-0 is gone"}},
		{"no lease", func(w *world) { w.hub.leases = w.hub.leases[1:] },
			[]string{"fail: " + vm + " > lease: the DHCP server gave 02:00:00:00:01:1a no address"}},
		{"another address is kept for it, and one elsewhere, and it has not asked since", func(w *world) {
			for _, ip := range []string{"10.7.0.50", "192.168.10.20"} {
				w.hub.leases = slices.Insert(w.hub.leases, 0, &v1.Lease{Ip: ip, Mac: w.hub.leases[len(w.hub.leases)-2].GetMac(), State: "reserved", Reserved: true})
			}
		}, nil},
		{"an address is kept for it, and it has none", func(w *world) {
			w.hub.leases[0] = &v1.Lease{Ip: "192.168.10.20", Mac: w.hub.leases[0].GetMac(), State: "reserved", Reserved: true}
		}, []string{"fail: " + vm + " > lease: the DHCP server gave 02:00:00:00:01:1a no address"}},
		{"another address than its lease", func(w *world) { w.hosts[0].vms[0].Status.Addresses = []string{"192.168.10.99"} },
			[]string{"fail: " + vm + " > lease: the guest has 192.168.10.99, but its lease is 192.168.10.26"}},
		{"no answer to a ping", func(w *world) { w.hub.dead = []string{"192.168.10.26"} },
			[]string{"fail: " + vm + " > lease > ping: 192.168.10.26 does not answer the hub: no reply within 2s"}},
		{"the agent is silent", func(w *world) { w.hosts[0].vms[0].Status.AgentReady = false },
			[]string{"fail: " + vm + " > agent: has not answered since the start 1m30s ago"}},
		{"an image without commands", func(w *world) {
			w.hosts[0].exec = func(string, []string) (int32, string, error) {
				return 127, "true: not found in the guest", nil
			}
		}, nil},
		{"packets leave as they are", func(w *world) {
			w.env.Hear = func(context.Context) (func() []netip.Addr, error) {
				return func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("192.168.10.26")} }, nil
			}
			w.hosts[0].exec = func(string, []string) (int32, string, error) { return 0, "", nil }
			w.hosts[0].latency = 0
		}, []string{"fail: network-hub > NAT > packet from host-0: default/vm-0-0 reached 100.64.0.1 in 1.0 ms, but as 192.168.10.26, its own address, which nobody masquerades"}},
		{"packets do not leave", func(w *world) {
			w.hosts[0].exec = func(_ string, args []string) (int32, string, error) {
				if args[0] == "ping" {
					return 1, "PING 100.64.0.1: 56 data bytes\n\n1 packets transmitted, 0 received\n", nil
				}
				return 0, "", nil
			}
		}, []string{"fail: network-hub > NAT > packet from host-0: default/vm-0-0 does not reach 100.64.0.1: 1 packets transmitted, 0 received"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := green(t, 1)
			c.ruin(w)
			r := Run(t.Context(), w.env)
			var found []string
			for _, f := range r.Findings() {
				found = append(found, steady(f))
			}
			if diff := cmp.Diff(c.want, found); diff != "" {
				t.Error(diff)
			}
			bad := slices.ContainsFunc(c.want, func(s string) bool { return strings.HasPrefix(s, "fail") })
			if r.OK == bad {
				t.Errorf("OK is %v with %q", r.OK, c.want)
			}
		})
	}
}

// TestNotAwaited has a microVM fail that nobody waits for, and the same one that
// somebody waits for.
func TestNotAwaited(t *testing.T) {
	w := green(t, 2)
	st := w.hosts[0].vms[0].Status
	st.Phase, st.Reason = "failed", "pull nosuch: not found"
	w.hosts[0].exec = func(uid string, args []string) (int32, string, error) {
		if args[0] == "ping" && uid != w.hosts[0].vms[1].Spec.GetUid() {
			return 1, "lost", nil
		}
		return 0, "", nil
	}
	for name, want := range map[string]string{"default/vm-0-1": "warn", "default/vm-0-0": "fail"} {
		w.env.Awaited = func(n string) bool { return n == name || n == "default/vm-0-1" }
		r := Run(t.Context(), w.env)
		if diff := cmp.Diff([]string{want + ": host-0 > microVMs > default/vm-0-0: failed: pull nosuch: not found"}, r.Findings()); diff != "" || r.OK != (want == "warn") {
			t.Errorf("%s is awaited: OK %v: %s", name, r.OK, diff)
		}
	}
}

// TestStuck is about what stays until somebody mends it, alone and beside what may pass.
func TestStuck(t *testing.T) {
	w := green(t, 1)
	w.env.Here = func(context.Context) []Check {
		return []Check{{Name: "firewall", Status: Fail, Detail: "dropped", Lasting: true}, {Name: "forwarding", Status: Warn}}
	}
	if r := Run(t.Context(), w.env); r.OK || !r.Stuck() {
		t.Errorf("only the firewall: OK %v, stuck %v", r.OK, r.Stuck())
	}
	w.hosts[0].vms[0].Status.Phase = "pending"
	if r := Run(t.Context(), w.env); r.OK || r.Stuck() {
		t.Errorf("and a microVM that boots: OK %v, stuck %v", r.OK, r.Stuck())
	}
	if r := Run(t.Context(), green(t, 1).env); r.Stuck() {
		t.Error("stuck, and green")
	}
}

// find is the check at a path of names, or nil.
func find(r Report, path ...string) *Check {
	checks := r.Checks
	var found *Check
	for _, name := range path {
		i := slices.IndexFunc(checks, func(c Check) bool { return c.Name == name })
		if i < 0 {
			return nil
		}
		found, checks = &checks[i], checks[i].Children
	}
	return found
}

// nobody is a connection to a port that nobody listens on.
func nobody(t *testing.T) grpc.ClientConnInterface {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestAHubThatIsGoneSparesWhatNeedsIt(t *testing.T) {
	w := green(t, 1)
	w.env.Hub.Conn = nobody(t)
	r := Run(t.Context(), w.env)
	if r.OK || len(r.Findings()) != 1 || !strings.Contains(r.Findings()[0], "192.168.10.2:9091 does not answer") {
		t.Errorf("findings: %q", r.Findings())
	}
	for _, path := range [][]string{
		{"network-hub", "DHCP server", "leases"}, {"network-hub", "NAT", "packet from host-0"},
		{"host-0", "microVMs", "default/vm-0-0", "lease", "ping"},
	} {
		if c := find(r, path...); c == nil || c.Status != Skip || c.Detail != "network-hub failed" {
			t.Errorf("%q: %+v", path, c)
		}
	}
	if c := find(r, "host-0", "microVMs", "default/vm-0-0", "agent"); c == nil || c.Status != Pass {
		t.Errorf("the agent needs no hub: %+v", c)
	}
}

func TestAHostThatIsGone(t *testing.T) {
	w := green(t, 1)
	w.env.Hosts[1].Conn = nobody(t)
	r := Run(t.Context(), w.env)
	if len(r.Findings()) != 1 || !strings.HasPrefix(r.Findings()[0], "fail: host-1: the host daemon at 192.168.10.4:9090 does not answer") {
		t.Errorf("findings: %q", r.Findings())
	}
	if c := find(r, "host-1", "containerd", "images"); c == nil || c.Status != Skip || c.Detail != "host-1 failed" {
		t.Errorf("%+v", c)
	}
	if c := find(r, "network-hub", "NAT", "packet from host-1"); c == nil || c.Status != Skip || c.Detail != "host-1 failed" {
		t.Errorf("%+v", c)
	}
}

func TestJSONIsTheStableForm(t *testing.T) {
	data, err := json.Marshal(Report{Environment: "lab", Checks: []Check{
		{Name: "hub", Status: Fail, Detail: "why", Took: 0.25, Notes: []string{"not shown"}, Children: skipped([]step{{name: "dns"}}, "hub failed")},
	}})
	const want = `{"environment":"lab","ok":false,"checks":[{"name":"hub","status":"fail","detail":"why","took":0.25,` +
		`"children":[{"name":"dns","status":"skip","detail":"hub failed","took":0,"children":[]}]}]}`
	if err != nil || string(data) != want {
		t.Errorf("%s, %v", data, err)
	}
}

// TestWait mends the world while somebody waits for it.
func TestWait(t *testing.T) {
	w := green(t, 1)
	w.hub.facts.Dns.Serving = false
	var bad int
	r := Wait(t.Context(), w.env, func(r Report) {
		if !r.OK {
			bad++
		}
		if bad == 2 {
			w.hub.mu.Lock()
			defer w.hub.mu.Unlock()
			f := hubFacts()
			w.hub.facts = f
		}
	})
	if !r.OK || bad != 2 {
		t.Errorf("OK %v after %d reports that were not", r.OK, bad)
	}
}

func TestWaitEndsWithTheLastReport(t *testing.T) {
	w := green(t, 1)
	w.hub.facts.Dns.Serving = false
	ctx, cancel := context.WithCancelCause(t.Context())
	r := Wait(ctx, w.env, func(Report) { cancel(errors.New("enough")) })
	if r.OK || len(r.Findings()) != 1 {
		t.Errorf("OK %v, %q", r.OK, r.Findings())
	}
}

// TestParallel has every answer take 20 ms: of ten microVMs' checks, none waits
// for another that it does not need. What must come one after the other is the
// facts, the listing, and a microVM's lease, ping or command.
func TestParallel(t *testing.T) {
	const latency = 20 * time.Millisecond
	w := green(t, 5)
	w.hub.latency = latency
	for _, h := range w.hosts {
		h.latency = latency
	}
	r := Run(t.Context(), w.env)
	if !r.OK || r.Took > 8*latency {
		t.Errorf("OK %v, took %s; %q", r.OK, r.Took, r.Findings())
	}
}

func BenchmarkRun(b *testing.B) {
	w := green(b, 5)
	for b.Loop() {
		if r := Run(b.Context(), w.env); !r.OK {
			b.Fatal(r.Findings())
		}
	}
}

func TestManyRanges(t *testing.T) {
	d := hubFacts().Dhcp
	for n, want := range map[int]string{
		1: "192.168.10.10-192.168.10.12 on ", 3: "192.168.10.10-192.168.10.12, 192.168.10.26-192.168.10.30, 10.7.0.10-10.7.0.20 on ",
		5: "192.168.10.10-192.168.10.12, 192.168.10.26-192.168.10.30, 10.7.0.10-10.7.0.20 and 2 more ranges on ",
	} {
		d.Ranges = []string{"192.168.10.10-192.168.10.12", "192.168.10.26-192.168.10.30", "10.7.0.10-10.7.0.20", "10.8.0.1-10.8.0.2", "10.9.0.1-10.9.0.2"}[:n]
		if got := checkDHCP(d).detail; !strings.HasPrefix(got, want) {
			t.Errorf("%d: %s", n, got)
		}
	}
}

func TestBeyond(t *testing.T) {
	for prefix, want := range map[string]string{
		"100.64.0.2/30": "100.64.0.1", "100.64.0.5/30": "100.64.0.6", "10.0.0.2/24": "invalid IP",
	} {
		f := hubFacts()
		f.Interfaces[1].Addresses = []string{"fe80::1/64", prefix}
		if got := beyond(f).String(); got != want {
			t.Errorf("%s: %s, want %s", prefix, got, want)
		}
	}
}

func ExampleReport_Findings() {
	r := Report{Checks: []Check{{Name: "network-hub", Status: Fail, Children: []Check{{Name: "DNS", Status: Fail, Detail: "does not serve"}}}}}
	fmt.Println(r.Findings()[0])
	// Output: fail: network-hub > DNS: does not serve
}
