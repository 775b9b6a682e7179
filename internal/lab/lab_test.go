package lab_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ingot/internal/lab"
	"ingot/internal/logfile"
	"ingot/internal/need"
	"ingot/internal/run"
)

// TestMain lets the test binary stand in for ingot: a lab runs it as its first
// processes, its supervisor and its roles.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "lab" {
		if err := labMain(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func labMain(what string, args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	switch what {
	case "hold":
		return lab.Hold(os.Stdin, os.Stdout)
	case "enter":
		return lab.Enter(args[0], args[2:])
	case "supervise":
		return lab.Supervise(ctx, args[0], os.Stdin, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case "write":
		return lab.Write(os.Stdin)
	case "make", "unmake":
		return makeAndUnmake(ctx, what, args[0])
	case "role":
		fmt.Println("role", args[0])
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("unknown: %s", what)
}

func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	return labBeside(t, "lab", "192.168.77.0/25")
}

// labBeside is a lab of three machines, which may stand beside others.
func labBeside(t *testing.T, name, subnet string, taken ...netip.Prefix) *lab.Lab {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "ip")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uplink, err := lab.FreeSubnet(netip.MustParsePrefix("100.64.40.0/30"), "", taken...)
	if err != nil {
		t.Fatal(err)
	}
	role := func(name string) []lab.Role { return []lab.Role{{Name: "r", Args: []string{"lab", "role", name}}} }
	hub := netip.MustParsePrefix(subnet).Addr().Next().Next()
	l := lab.New(lab.Config{
		Name: name + "test", Dir: t.TempDir(), RunDir: "/run/ingot-labtest/" + name, Binary: self,
		Subnet: netip.MustParsePrefix(subnet), Uplink: uplink,
		Machines: []lab.Machine{
			{Name: "network-hub", Address: hub, Hub: true, Roles: role("hub")},
			{Name: "host-0", Address: hub.Next(), Host: true, Roles: role("host")},
			{Name: "host-1", Address: hub.Next().Next(), Host: true, Roles: role("host")},
		},
	})
	if err := l.Remove(t.Context()); err != nil { // of a run that was killed
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := l.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return l
}

func sh(t *testing.T, c *exec.Cmd) string {
	t.Helper()
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", c.Args, err, out)
	}
	return string(out)
}

// world is what a lab must leave as it found it.
func world(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, argv := range [][]string{
		{"ip", "-br", "link"}, {"ip", "route"}, {"nft", "list", "tables"}, {"sysctl", "-a", "-r", `net.ipv4.conf.*\.forwarding`},
		{"sh", "-c", "cut -d' ' -f5 /proc/self/mountinfo | sort"}, {"sh", "-c", "ls /run | grep ingot-labtest || true"},
	} {
		b.WriteString(sh(t, exec.Command(argv[0], argv[1:]...)))
	}
	return b.String()
}

func ensure(t *testing.T, l *lab.Lab, want bool) {
	t.Helper()
	start := time.Now()
	changed, err := l.Ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ensure: changed %v in %v", changed, time.Since(start))
	if changed != want {
		t.Errorf("changed %v, want %v", changed, want)
	}
}

func TestLabIsWhatThePageShows(t *testing.T) {
	l := newLab(t)
	before := world(t)
	ensure(t, l, true)
	ensure(t, l, false)
	for _, m := range l.Machines {
		in := func(argv ...string) string { return sh(t, l.Command(t.Context(), m.Name, argv...)) }
		if got := strings.TrimSpace(in("hostname")); got != m.Name {
			t.Errorf("hostname is %s, want %s", got, m.Name)
		}
		page := in("sh", "-c", "ip a | grep -A 3 bond0.1000")
		if want := fmt.Sprintf("inet %s/25 scope global bond0.1000", m.Address); !strings.Contains(page, want) {
			t.Errorf("%s shows no %q:\n%s", m.Name, want, page)
		}
		in("sh", "-c", "echo x > /var/lib/dhcp/x && echo y > /etc/new && test -d /run && ls /sys/class/net/bond0.1000 > /dev/null")
		for _, other := range l.Machines {
			in("ping", "-c", "1", "-W", "2", other.Address.String())
		}
		in("ping", "-c", "1", "-W", "2", l.RootEnd().String())
		sh(t, exec.Command("ping", "-c", "1", "-W", "2", m.Address.String()))
		if _, err := os.Stat("/etc/new"); err == nil {
			t.Fatal("a machine's file is in this machine's /etc")
		}
		if b, err := os.ReadFile(filepath.Join(l.Dir, "machines", m.Name, "var/lib/dhcp/x")); err != nil || string(b) != "x\n" {
			t.Errorf("a machine's file is not kept: %q, %v", b, err)
		}
	}
	changed, err := l.WriteFile("host-0", "/etc/ingot/token", []byte("t"), 0o600)
	if err != nil || !changed {
		t.Fatalf("changed %v, %v", changed, err)
	}
	if got := sh(t, l.Command(t.Context(), "host-0", "cat", "/etc/ingot/token")); got != "t" {
		t.Errorf("got %q", got)
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, world(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

// eventually waits for something that happens in another process.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func pids(l *lab.Lab) map[string]int {
	found := map[string]int{}
	for _, m := range l.States() {
		for _, r := range m.Roles {
			if r.Running {
				found[m.Name] = r.PID
			}
		}
	}
	return found
}

func allRun(l *lab.Lab) func() bool { return func() bool { return len(pids(l)) == len(l.Machines) } }

func TestRolesAreKeptRunning(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	start := func() {
		t.Helper()
		if err := l.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	start()
	eventually(t, "all roles run", allRun(l))
	first := pids(l)
	start()
	if diff := cmp.Diff(first, pids(l)); diff != "" {
		t.Errorf("a second start changed something: %s", diff)
	}

	unix.Kill(first["host-0"], unix.SIGKILL)
	eventually(t, "a killed role runs again", func() bool {
		now := pids(l)
		return now["host-0"] != 0 && now["host-0"] != first["host-0"]
	})
	second := pids(l)

	// The supervisor dies: the roles live, and are found again.
	killSupervisor(t, l)
	eventually(t, "the supervisor is gone", func() bool { return !l.Supervised() })
	start()
	eventually(t, "the supervisor runs", l.Supervised)
	if diff := cmp.Diff(second, pids(l)); diff != "" {
		t.Errorf("a new supervisor restarted roles: %s", diff)
	}
	unix.Kill(second["host-1"], unix.SIGKILL)
	eventually(t, "an adopted role that dies runs again", func() bool {
		now := pids(l)
		return now["host-1"] != 0 && now["host-1"] != second["host-1"]
	})

	// Changed arguments restart that role, and no other.
	third := pids(l)
	l.Config.Machines[0].Roles[0].Args = []string{"lab", "role", "other"}
	start()
	eventually(t, "a changed role is restarted", func() bool {
		now := pids(l)
		return now["network-hub"] != 0 && now["network-hub"] != third["network-hub"]
	})
	if now := pids(l); now["host-0"] != third["host-0"] {
		t.Error("another role was restarted as well")
	}
}

func killSupervisor(t *testing.T, l *lab.Lab) {
	t.Helper()
	out, err := exec.Command("pgrep", "-f", "lab supervise "+l.RunDir).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Fields(string(out)) {
		var pid int
		fmt.Sscan(line, &pid)
		p, err := run.FindProcess(pid, 0)
		if err == nil {
			p.Signal(unix.SIGKILL)
			p.Close()
		}
	}
}

func TestEnsureMendsAndRemoveFindsAll(t *testing.T) {
	l := newLab(t)
	before := world(t)
	ensure(t, l, true)
	sh(t, exec.Command("ip", "link", "del", l.Device()))
	ensure(t, l, true)
	sh(t, exec.Command("ping", "-c", "1", "-W", "2", "192.168.77.3"))
	// Half a namespace: what a killed Ensure leaves.
	if err := unix.Unmount(filepath.Join(l.RunDir, "ns", "host-1", "uts"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(l.RunDir, "made", "host-1")); err != nil {
		t.Fatal(err)
	}
	ensure(t, l, true)
	sh(t, exec.Command("ping", "-c", "1", "-W", "2", "192.168.77.4"))
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all roles run", allRun(l))
	killSupervisor(t, l)
	// Another process, with no memory of what was made.
	if err := lab.New(l.Config).Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, world(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Errorf("remove what is removed: %v", err)
	}
}

// makeAndUnmake is a process that makes a lab and starts its roles, or removes it.
func makeAndUnmake(ctx context.Context, what, config string) error {
	var l lab.Lab
	if err := json.Unmarshal([]byte(config), &l.Config); err != nil {
		return err
	}
	if what == "unmake" {
		return l.Remove(ctx)
	}
	if _, err := l.Ensure(ctx); err != nil {
		return err
	}
	return l.Start(ctx)
}

// TestKilledAnywhere kills what makes the lab, and what removes it, at moments
// spread over the whole of the run: the next one completes it, and nothing is left.
func TestKilledAnywhere(t *testing.T) {
	moments := 12
	if testing.Short() {
		moments = 3
	}
	l := newLab(t)
	before := world(t)
	config, err := json.Marshal(l.Config)
	if err != nil {
		t.Fatal(err)
	}
	command := func(what string) *exec.Cmd { return exec.Command(l.Binary, "lab", what, string(config)) }
	for _, c := range []struct{ broken, mended string }{{"make", "make"}, {"unmake", "unmake"}, {"make", "unmake"}, {"unmake", "make"}} {
		// How long it takes, uninterrupted.
		sh(t, command(map[string]string{"make": "unmake", "unmake": "make"}[c.broken]))
		start := time.Now()
		sh(t, command(c.broken))
		took := time.Since(start)
		for i := range moments {
			sh(t, command(map[string]string{"make": "unmake", "unmake": "make"}[c.broken]))
			victim := command(c.broken)
			if err := victim.Start(); err != nil {
				t.Fatal(err)
			}
			timer := time.AfterFunc(took*time.Duration(i)/time.Duration(moments), func() { _ = victim.Process.Kill() })
			_ = victim.Wait()
			timer.Stop()
			if out, err := command(c.mended).CombinedOutput(); err != nil {
				log, _ := os.ReadFile(filepath.Join(l.Dir, "log", "supervisor.log"))
				t.Fatalf("%s was killed after %v, and then %s: %v\n%s\n%s", c.broken, took*time.Duration(i)/time.Duration(moments), c.mended, err, out, log)
			}
			if c.mended == "make" { // a role that was asked to end may do so yet
				eventually(t, fmt.Sprintf("roles run after %s was killed", c.broken), allRun(l))
			}
		}
		t.Logf("%s killed %d times within %v, then %s", c.broken, moments, took, c.mended)
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, world(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	eventually(t, "no process is left", func() bool {
		return exec.Command("pgrep", "-f", "^"+l.Binary+" lab").Run() != nil
	})
}

func TestASupervisorWithoutItsStarterDoesNotBegin(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	out, err := exec.Command(l.Binary, "lab", "supervise", l.RunDir).CombinedOutput() // standard input is empty
	if err == nil || !strings.Contains(string(out), "has not said to begin") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestMachinesComeAndGo changes the configuration of a lab that runs: what is not
// in question runs on.
func TestMachinesComeAndGo(t *testing.T) {
	l := newLab(t)
	before := world(t)
	up := func(changed bool) {
		t.Helper()
		ensure(t, l, changed)
		if err := l.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "all roles run", allRun(l))
	}
	in := func(machine string, argv ...string) string {
		t.Helper()
		return sh(t, l.Command(t.Context(), machine, argv...))
	}
	up(true)
	first := pids(l)
	for _, m := range l.Machines {
		in(m.Name, "sh", "-c", "echo kept > /var/lib/ingot/kept")
	}

	in("host-0", "ping", "-c", "1", "-W", "2", "192.168.77.4") // it knows host-1's MAC address now
	sh(t, exec.Command("ping", "-c", "1", "-W", "2", "192.168.77.4"))

	// Another machine has the address of the one that is gone.
	one, last := l.Config.Machines[:2:2], l.Config.Machines[2]
	long := lab.Machine{Name: "a-host-with-a-long-name", Address: netip.MustParseAddr("192.168.77.4"), Host: true, Roles: last.Roles}
	l.Config.Machines = append(one, long)
	strays, err := l.Strays()
	if diff := cmp.Diff([]string{"host-1"}, strays); diff != "" || err != nil {
		t.Errorf("strays: %v %s", err, diff)
	}
	up(true)
	up(false)
	second := pids(l)
	if second["network-hub"] != first["network-hub"] || second["host-0"] != first["host-0"] || second[long.Name] == 0 {
		t.Errorf("roles were %v, are %v", first, second)
	}
	if _, err := run.FindProcess(first["host-1"], 0); err == nil {
		t.Error("the role of the machine that is gone still runs")
	}
	if _, err := os.Stat(filepath.Join(l.Dir, "machines", "host-1")); err == nil {
		t.Error("its files are still there")
	}
	if hosts := in("host-0", "cat", "/etc/hosts"); !strings.Contains(hosts, "192.168.77.4 a-host-with-a-long-name") || strings.Contains(hosts, "host-1") {
		t.Errorf("host-0 has not heard of the change:\n%s", hosts)
	}
	in("host-0", "ping", "-c", "1", "-W", "2", "192.168.77.4")
	sh(t, exec.Command("ping", "-c", "1", "-W", "2", "192.168.77.4"))
	in("host-0", "cat", "/var/lib/ingot/kept")

	// What a removal that was killed has left is no machine's, whoever comes.
	half := filepath.Join(l.Dir, "machines", ".removed-host-1", "var/lib/ingot")
	if err := os.MkdirAll(half, 0o755); err != nil {
		t.Fatal(err)
	}
	l.Config.Machines = append(one, last)
	up(true)
	if out, err := l.Command(t.Context(), "host-1", "cat", "/var/lib/ingot/kept").CombinedOutput(); err == nil {
		t.Errorf("a new host-1 has the files of the old one: %s", out)
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, world(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

func TestARoleIsRestartedWhenItsFilesChange(t *testing.T) {
	l := newLab(t)
	l.Config.Machines[1].Roles[0].Files = []string{"/etc/ingot/role.yaml", "/etc/ingot/not-there"}
	write := func(text string) {
		t.Helper()
		if _, err := l.WriteFile("host-0", "/etc/ingot/role.yaml", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	start := func() map[string]int {
		t.Helper()
		if err := l.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		return pids(l)
	}
	ensure(t, l, true)
	write("a")
	first := start()
	write("b")
	stale := map[string]bool{}
	for _, m := range l.States() {
		stale[m.Name] = m.Roles[0].Stale
	}
	if diff := cmp.Diff(map[string]bool{"network-hub": false, "host-0": true, "host-1": false}, stale); diff != "" {
		t.Errorf("stale: %s", diff)
	}
	second := start()
	if second["host-0"] == first["host-0"] || second["host-1"] != first["host-1"] || second["network-hub"] != first["network-hub"] {
		t.Errorf("roles were %v, are %v: only that of host-0 reads the file", first, second)
	}
	if third := start(); third["host-0"] != second["host-0"] {
		t.Error("it was restarted without a change")
	}
}

// TestThisMachinesNetworkCannotGetIn sends from a neighbour of this machine's, which
// routes it as it would for anybody.
func TestThisMachinesNetworkCannotGetIn(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	away := func() {
		exec.Command("ip", "netns", "delete", "labtest-lan").Run()
		exec.Command("ip", "link", "delete", "labtest-end").Run()
	}
	away()
	t.Cleanup(away)
	sh(t, exec.Command("sh", "-ec", `ip netns add labtest-lan
		ip link add labtest-end type veth peer name eth0 netns labtest-lan
		ip address add 203.0.113.1/30 dev labtest-end; ip link set labtest-end up
		echo 1 >/proc/sys/net/ipv4/conf/labtest-end/forwarding
		ip -n labtest-lan address add 203.0.113.2/30 dev eth0; ip -n labtest-lan link set eth0 up
		ip -n labtest-lan route add 192.168.77.0/25 via 203.0.113.1
		ip netns exec labtest-lan ping -c 1 -W 5 203.0.113.1`))
	reach := func() error {
		return exec.Command("ip", "netns", "exec", "labtest-lan", "ping", "-c", "1", "-W", "1", "192.168.77.3").Run()
	}
	if reach() == nil {
		t.Error("the network of this machine reaches a host of the lab")
	}
	sh(t, exec.Command("nft", "delete", "table", "ip", l.Device()))
	if err := reach(); err != nil {
		t.Errorf("without the lab's rules: %v: this test shows nothing", err)
	}
}

// TestNoLabHoldsOnToAnother takes a lab down beside one that was made after it: its
// namespaces end, and with them what somebody has joined to them.
func TestNoLabHoldsOnToAnother(t *testing.T) {
	first := newLab(t)
	ensure(t, first, true)
	second := labBeside(t, "other", "192.168.78.0/25", first.Uplink)
	ensure(t, second, true)
	t.Cleanup(func() { exec.Command("ip", "link", "delete", "labtest-end").Run() })
	sh(t, exec.Command("ip", "link", "add", "labtest-end", "type", "veth", "peer", "name", "far-end", "netns", filepath.Join(first.RunDir, "ns/host-0/net")))
	sh(t, exec.Command("ip", "link", "show", "labtest-end"))
	if err := first.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the namespace of a machine that is gone has ended", func() bool {
		return exec.Command("ip", "link", "show", "labtest-end").Run() != nil
	})
	sh(t, second.Command(t.Context(), "host-0", "ping", "-c", "1", "-W", "2", "192.168.78.2"))
}

// TestARoleThatCannotBeNotedDoesNotRun has the supervisor fail to write down which
// process a role is, again and again: none of them may stay.
func TestARoleThatCannotBeNotedDoesNotRun(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	obstacle := filepath.Join(l.RunDir, "roles", "host-0.r.json", "x")
	if err := os.MkdirAll(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(l.Dir, "log", "supervisor.log")
	starting := make(chan error, 1)
	go func() { starting <- l.Start(t.Context()) }()
	eventually(t, "starting has failed twice", func() bool {
		b, _ := os.ReadFile(log)
		return strings.Count(string(b), "start role") >= 2
	})
	if err := os.RemoveAll(filepath.Dir(obstacle)); err != nil {
		t.Fatal(err)
	}
	if err := <-starting; err != nil {
		t.Fatal(err)
	}
	const roles = `for p in /proc/[0-9]*; do
		[ "$(readlink $p/ns/net)" = "$(readlink /proc/self/ns/net)" ] && tr '\0' ' ' <$p/cmdline | grep -c '[l]ab role'; done | grep -c 1`
	if out := sh(t, l.Command(t.Context(), "host-0", "sh", "-c", roles)); out != "1\n" {
		t.Errorf("so many processes of one role run: %s", out)
	}
}

// TestLogsAreBounded has a role's log that is too long already.
func TestLogsAreBounded(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	log := l.LogPath("host-0", "r")
	if err := errors.Join(os.MkdirAll(filepath.Dir(log), 0o700), os.WriteFile(log, nil, 0o600), os.Truncate(log, logfile.Max+1)); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the log is short again", func() bool {
		now, err := os.Stat(log)
		old, gone := os.Stat(log + ".1")
		return err == nil && gone == nil && now.Size() < logfile.Max && old.Size() > 0
	})
}

// TestMachinesDoNotFillTheLabsOwnFiles writes more into a machine's /etc than the
// lab's state may take.
func TestMachinesDoNotFillTheLabsOwnFiles(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	sh(t, l.Command(t.Context(), "host-0", "sh", "-c", "head -c 70000000 /dev/zero >/etc/much"))
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestOneMachineIsHubAndHost has a machine with both roles, and another host.
func TestOneMachineIsHubAndHost(t *testing.T) {
	l := newLab(t)
	before := world(t)
	l.Config.Machines = l.Config.Machines[:2]
	l.Config.Machines[0].Host = true
	ensure(t, l, true)
	ensure(t, l, false)
	in := func(machine string, argv ...string) string {
		t.Helper()
		return sh(t, l.Command(t.Context(), machine, argv...))
	}
	in("network-hub", "ping", "-c", "1", "-W", "2", "192.168.77.3")
	in("host-0", "ping", "-c", "1", "-W", "2", "192.168.77.2")
	sh(t, exec.Command("ping", "-c", "1", "-W", "2", "192.168.77.3"))
	// A guest on each machine's bridge reaches both machines and the other guest.
	for machine, address := range map[string]string{"network-hub": "192.168.77.50/25", "host-0": "192.168.77.51/25"} {
		in(machine, "sh", "-ec", `ip netns add guest; ip link add tap0 type veth peer name eth1 netns guest; ip link set tap0 master ingot0 up
			ip -n guest address add `+address+` dev eth1; ip -n guest link set eth1 up; ip -n guest link set lo up`)
	}
	for _, machine := range []string{"network-hub", "host-0"} {
		for _, to := range []string{"192.168.77.2", "192.168.77.3", "192.168.77.50", "192.168.77.51"} {
			in(machine, "ip", "netns", "exec", "guest", "ping", "-c", "1", "-W", "2", to)
		}
	}
	if err := l.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, world(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

func TestDeviceFitsAnInterface(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"lab", "ninechars", "ten-chars0", "a-name-of-32-characters-000000000", "a-name-of-32-characters-000000001"} {
		d := lab.New(lab.Config{Name: name}).Device()
		if len(d) > 15 || seen[d] != "" {
			t.Errorf("%s has %s, of %d characters; also %q has it", name, d, len(d), seen[d])
		}
		seen[d] = name
	}
}

// TestASupervisorThatDoesNotListenIsReplaced has what an `up` leaves that was killed
// before its supervisor began: a process that is known, and keeps no roles.
func TestASupervisorThatDoesNotListenIsReplaced(t *testing.T) {
	l := newLab(t)
	ensure(t, l, true)
	deaf := exec.Command("sleep", "60")
	if err := deaf.Start(); err != nil {
		t.Fatal(err)
	}
	start, err := run.StartTime(deaf.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	record := fmt.Sprintf(`{"pid": %d, "start": %d}`, deaf.Process.Pid, start)
	if err := os.WriteFile(filepath.Join(l.RunDir, "supervisor.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := deaf.Wait(); err == nil {
		t.Error("it was not ended")
	}
	if !l.Supervised() || !allRun(l)() {
		t.Error("no supervisor keeps the roles")
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	first, err := lab.Lock(t.Context(), path, func() { t.Error("the first one waits") })
	if err != nil {
		t.Fatal(err)
	}
	waits, inside, done := make(chan bool, 2), make(chan bool, 1), make(chan error, 2)
	for range 2 {
		go func() {
			l, err := lab.Lock(t.Context(), path, func() { waits <- true })
			if err != nil {
				done <- err
				return
			}
			inside <- true // would block if the other one were inside
			<-inside
			done <- l.Release()
		}()
	}
	<-waits
	<-waits
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := lab.Lock(ctx, path, cancel); err == nil {
		t.Error("locked twice")
	}
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the lock's file is left")
	}
}

func TestFreeSubnetAvoidsWhatIsTaken(t *testing.T) {
	p := netip.MustParsePrefix
	for _, c := range []struct {
		want  netip.Prefix
		taken []netip.Prefix
		got   netip.Prefix
	}{
		{p("192.168.250.0/25"), nil, p("192.168.250.0/25")},
		{p("192.168.250.0/25"), []netip.Prefix{p("192.168.250.64/26")}, p("192.168.251.0/25")},
		{p("192.168.252.0/22"), []netip.Prefix{p("192.168.255.0/24"), p("192.168.0.0/18")}, p("192.168.64.0/22")}, // from the beginning
		{p("10.200.0.0/16"), []netip.Prefix{p("10.200.7.0/24")}, p("10.201.0.0/16")},
		{p("100.64.77.252/30"), []netip.Prefix{p("100.64.77.252/30")}, p("100.64.78.0/30")},
	} {
		got, err := lab.FreeSubnet(c.want, "", c.taken...)
		if err != nil || got != c.got {
			t.Errorf("%s without %s: %s, %v, want %s", c.want, c.taken, got, err, c.got)
		}
	}
	if got, err := lab.FreeSubnet(p("192.168.0.0/16"), "", p("192.168.3.0/30")); err == nil {
		t.Errorf("got %s", got)
	}
}

func TestFreeSubnet(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	l := newLab(t)
	ensure(t, l, true)
	got, err := lab.FreeSubnet(l.Subnet, "")
	if err != nil || got == l.Subnet || got.Bits() != 25 {
		t.Errorf("got %v, %v: want another /25", got, err)
	}
	if got, err := lab.FreeSubnet(l.Subnet, l.Device()); err != nil || got != l.Subnet {
		t.Errorf("got %v, %v: the lab's own route is not in the way", got, err)
	}
}
