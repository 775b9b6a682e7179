package lab_test

import (
	"context"
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
		return lab.Supervise(ctx, args[0], slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case "role":
		fmt.Println("role", args[0])
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("unknown: %s", what)
}

func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "ip")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uplink, err := lab.FreeSubnet(netip.MustParsePrefix("100.64.40.0/30"), "")
	if err != nil {
		t.Fatal(err)
	}
	role := func(name string) []lab.Role { return []lab.Role{{Name: "r", Args: []string{"lab", "role", name}}} }
	a := netip.MustParseAddr
	l := lab.New(lab.Config{
		Name: "labtest", Dir: t.TempDir(), RunDir: "/run/ingot-labtest/lab", Binary: self,
		Subnet: netip.MustParsePrefix("192.168.77.0/25"), Uplink: uplink,
		Machines: []lab.Machine{
			{Name: "network-hub", Address: a("192.168.77.2"), Hub: true, Roles: role("hub")},
			{Name: "host-0", Address: a("192.168.77.3"), Roles: role("host")},
			{Name: "host-1", Address: a("192.168.77.4"), Roles: role("host")},
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
