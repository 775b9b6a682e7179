package hub

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
	"ingot/internal/tests"
)

// hubEnv is set in processes that are hubs, to their configuration file.
const hubEnv = "INGOT_TEST_HUB"

// TestMain runs the tests where the hub's files are not this machine's; or a hub.
func TestMain(m *testing.M) {
	file := os.Getenv(hubEnv)
	if file == "" {
		tests.Apart(m, ownFiles)
	}
	if err := runHub(file); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runHub(file string) error {
	c, err := ReadConfig(file, "test")
	if err != nil {
		return err
	}
	h, err := New(c, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	return h.Run(context.Background())
}

func ownFiles() error {
	// Programs that tests run look here, and find iptables by way of a link.
	kept := map[string][]byte{}
	for _, path := range []string{"/etc/passwd", "/etc/protocols"} {
		if b, err := os.ReadFile(path); err == nil {
			kept[path] = b
		}
	}
	links, _ := filepath.Glob("/etc/alternatives/ip*tables*")
	leads := map[string]string{}
	for _, path := range links {
		leads[path], _ = os.Readlink(path)
	}
	for _, dir := range []string{"/run", "/etc", "/var/lib"} {
		if err := tests.Fresh("tmpfs", dir)(); err != nil {
			return err
		}
	}
	if err := os.Mkdir("/etc/alternatives", 0o755); err != nil {
		return err
	}
	for path, b := range kept {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	for path, to := range leads {
		if err := os.Symlink(to, path); err != nil {
			return err
		}
	}
	return nil
}

func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// start runs a hub in a process of its own, until the test ends or kill.
func start(t *testing.T, config string) (kill func()) {
	t.Helper()
	var log strings.Builder
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), hubEnv+"="+config)
	c.Stdout, c.Stderr = &log, &log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill = func() {
		if !killed {
			killed = true
			c.Process.Kill()
			c.Wait()
			if t.Failed() {
				t.Logf("the hub's log:\n%s", log.String())
			}
		}
	}
	t.Cleanup(kill)
	return kill
}

// TestHub is what a guest, an operator and a crash see of a hub.
func TestHub(t *testing.T) {
	segment(t)
	dir, config := configured(t, "trusted: 100.64.0.0/30\nmachines: [{name: network-hub, address: 192.168.10.2}, {name: Host-0, address: 192.168.10.3}]\n", nil)
	hub := operator(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	// lease is the only one, once the hub serves.
	lease := func() *ingotv1.Lease {
		t.Helper()
		r, err := hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		if len(r.GetLeases()) == 0 {
			return nil
		}
		return r.GetLeases()[0]
	}
	set := write(t, dir+"/set", "#!/bin/sh\n[ -z $ip ] || ip addr replace $ip/25 dev eth0\n")
	ask := func(name string) {
		t.Helper()
		sh(t, "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s "+set+" -x hostname:"+name+" 2>&1")
	}
	resolves := func(name, ip string) {
		t.Helper()
		got := sh(t, "ip netns exec guest busybox nslookup -type=a "+name+" 192.168.10.2")
		if !strings.Contains(got, "Address: "+ip+"\n") {
			t.Errorf("%s is not %s, but\n%s", name, ip, got)
		}
	}

	kill := start(t, config)
	if l := lease(); l != nil {
		t.Fatalf("at first there is %v", l)
	}
	ask("box")
	l := lease()
	if l.GetIp() != "192.168.10.26" || l.GetHostname() != "box" || l.GetState() != "active" || l.GetReserved() {
		t.Errorf("got %v", l)
	}
	resolves("box.lab.internal", "192.168.10.26")
	if _, err := hub.ReleaseLease(ctx, &ingotv1.ReleaseLeaseRequest{Mac: l.GetMac()}); err != nil || lease().GetState() != "released" {
		t.Errorf("release by MAC: %v", err)
	}
	if _, err := hub.ReleaseLease(ctx, &ingotv1.ReleaseLeaseRequest{Mac: l.GetMac()}); status.Code(err) != codes.NotFound {
		t.Errorf("release it twice: %v", err)
	}
	ask("box")
	resolves("box.lab.internal", "192.168.10.26")
	resolves("host-0.lab.internal", "192.168.10.3")
	ask("host-0") // a guest can't take a machine's name
	resolves("host-0.lab.internal", "192.168.10.3")
	if _, err := hub.Reserve(ctx, &ingotv1.ReserveRequest{Mac: l.GetMac(), Ip: "192.168.10.50"}); err != nil {
		t.Fatal(err)
	}
	f, err := hub.Facts(ctx, &emptypb.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if d := f.GetDhcp(); !d.GetServing() || d.GetActive() != 1 || d.GetDefaultLease().AsDuration() != 10*time.Minute || len(d.GetForeign()) != 0 ||
		len(f.GetNat().GetMissing()) != 0 || !f.GetRegistry().GetServing() || !f.GetDns().GetServing() {
		t.Errorf("facts: %v", f)
	}

	kill()
	start(t, config)
	if again := lease(); again.GetIp() != l.GetIp() || again.GetMac() != l.GetMac() || again.GetState() != "active" {
		t.Errorf("after a crash there is %v, not %v", again, l)
	}
	ask("box")
	if got := sh(t, "ip -n guest -4 -o addr show eth0"); !strings.Contains(got, "192.168.10.50/25") {
		t.Errorf("after a crash the reserved address is not given: %s", got)
	}
	if _, err := hub.Unreserve(ctx, &ingotv1.UnreserveRequest{Mac: l.GetMac()}); err != nil {
		t.Error(err)
	}
	if _, err := hub.Unreserve(ctx, &ingotv1.UnreserveRequest{Mac: l.GetMac()}); err == nil {
		t.Error("what is not reserved was given back")
	}
}

// A hub that can't say what may pass leaves the machine closed.
func TestNoForwardingWithoutRules(t *testing.T) {
	config, _ := alone(t)
	mkdir(t, filepath.Dir(accessFile))
	write(t, accessFile, "torn")
	for _, name := range []string{"segment", "uplink"} {
		if _, err := nat.SetForwarding(name, false); err != nil {
			t.Fatal(err)
		}
	}
	c, err := ReadConfig(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	h, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Run(t.Context()); err == nil || !strings.Contains(err.Error(), accessFile) {
		t.Errorf("with a torn %s: %v", accessFile, err)
	}
	for _, name := range []string{"segment", "uplink"} {
		if on, err := nat.Forwarding(name); on || err != nil {
			t.Errorf("%s forwards: %v, %v", name, on, err)
		}
	}
}
