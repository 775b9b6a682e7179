package vpn

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/link"
	"ingot/internal/need"
	"ingot/internal/tests"
)

// serverEnv is set in processes that are servers, to their directory.
const serverEnv = "INGOT_TEST_VPN"

var subnet = netip.MustParsePrefix("10.91.0.0/24")

const port = 51820

// TestMain runs the tests, or a server.
func TestMain(m *testing.M) {
	if dir := os.Getenv(serverEnv); dir != "" {
		if err := server(dir).Run(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	tests.Apart(m, tests.Fresh("tmpfs", "/run"))
}

func server(dir string) *Server {
	return New(Settings{Dir: dir, Interface: "vpn0", Subnet: subnet, Port: port, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
}

func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func fails(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err == nil {
		t.Errorf("%s succeeds:\n%s", line, out)
	}
}

// eventually runs a command again and again until it succeeds.
func eventually(t *testing.T, line string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); exec.Command("sh", "-c", line).Run() != nil; {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not succeed", line)
		}
	}
}

// network has this namespace as the hub, with a machine behind it and two devices
// outside, each in a namespace of its own.
func network(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	for _, name := range []string{"wg-quick", "wg", "wireguard-go", "busybox"} {
		need.Binary(t, name)
	}
	// The interfaces go first: those within a namespace go some time after its end.
	t.Cleanup(func() {
		sh(t, `for d in laptop phone stranger; do [ ! -e /run/wireguard/$d.sock ] || ip netns exec $(cat /run/where-$d) ip link del $d; done
			for i in segment d2 d3 outside vpn0; do ip link del $i 2>/dev/null; done; rm -rf /run/wireguard
			for n in box device2 device3; do ip netns del $n; done`)
	})
	sh(t, `set -e; ip link set lo up
		ip netns add box; ip link add segment type veth peer name eth0 netns box; ip addr add 192.168.10.2/25 dev segment; ip link set segment up
		ip -n box addr add 192.168.10.3/25 dev eth0; ip -n box link set eth0 up; ip -n box route add default via 192.168.10.2
		sysctl -qw net.ipv4.conf.segment.forwarding=1
		ip link add outside type bridge; ip addr add 203.0.113.1/24 dev outside; ip link set outside up
		for i in 2 3; do ip netns add device$i; ip -n device$i link set lo up; ip link add d$i type veth peer name eth0 netns device$i
			ip link set d$i master outside up; ip -n device$i addr add 203.0.113.$i/24 dev eth0; ip -n device$i link set eth0 up; done`)
}

// connect has a device use a peer's configuration, as its owner would.
func connect(t *testing.T, device, name string, c Client) {
	t.Helper()
	c.Routes, c.Endpoint = []netip.Prefix{netip.MustParsePrefix("192.168.10.0/25"), netip.MustParsePrefix("10.91.0.1/32")}, "203.0.113.1:51820"
	file := filepath.Join(t.TempDir(), name+".conf")
	if err := os.WriteFile(file, []byte(c.Config()), 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, fmt.Sprintf("echo %[1]s >/run/where-%[2]s; ip netns exec %[1]s wg-quick up %[3]s </dev/null >/run/wg-quick.log 2>&1 || { cat /run/wg-quick.log; exit 1; }", device, name, file))
}

func ping(device, to string, wait int) string {
	return fmt.Sprintf("ip netns exec %s busybox ping -c 1 -W %d %s", device, wait, to)
}

// admit adds a peer with a new key, as the command line does.
func admit(t *testing.T, s *Server, name string) Client {
	t.Helper()
	key, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Add(name, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return Client{Key: key, Address: p.Address, Server: s.Facts().Key}
}

// start runs a server in this process until the test ends.
func start(t *testing.T, s *Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Ready():
	case <-time.After(10 * time.Second):
		t.Fatal("it does not serve:", s.Facts().Error)
	}
}

// TestPeers is what devices see of a server that lets them in, and others not.
func TestPeers(t *testing.T) {
	network(t)
	s := server(t.TempDir())
	start(t, s)
	laptop := admit(t, s, "laptop")
	connect(t, "device2", "laptop", laptop)
	sh(t, ping("device2", "192.168.10.3", 5))
	sh(t, ping("device2", "10.91.0.1", 5))
	sh(t, "ip netns exec box busybox nc -ll -p 7777 -e echo hello >/dev/null 2>&1 & echo $! >/run/nc.pid")
	defer sh(t, "kill $(cat /run/nc.pid)")
	if got := sh(t, "sleep 0.2; ip netns exec device2 busybox nc -w 5 192.168.10.3 7777 </dev/null"); got != "hello\n" {
		t.Errorf("by TCP came %q", got)
	}
	// The machine on the segment sees who it is.
	sh(t, "ip netns exec box busybox ping -c 1 -W 5 10.91.0.2")

	before := s.Facts().Peers[0]
	if before.Handshake.IsZero() || before.Endpoint.Addr().String() != "203.0.113.2" || before.Received == 0 || before.Sent == 0 {
		t.Errorf("the server knows %+v", before)
	}

	// Whom it does not know it does not answer.
	unknown, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	connect(t, "device3", "stranger", Client{Key: unknown, Address: netip.MustParseAddr("10.91.0.3"), Server: laptop.Server})
	fails(t, ping("device3", "192.168.10.3", 2))
	if got := sh(t, "ip netns exec device3 wg show stranger transfer"); !regexp.MustCompile(`\t0\t[1-9]\d*\n$`).MatchString(got) {
		t.Errorf("the stranger received, and sent: %s", got)
	}
	sh(t, "ip netns exec device3 ip link del stranger")

	// Another peer comes and goes, and the first one does not notice.
	phone := admit(t, s, "phone")
	if phone.Address.String() != "10.91.0.3" {
		t.Errorf("the second peer has %s", phone.Address)
	}
	connect(t, "device3", "phone", phone)
	sh(t, ping("device3", "192.168.10.3", 5))
	// It can't send as the first one.
	sh(t, "ip -n device3 addr add 10.91.0.2/32 dev phone")
	fails(t, ping("device3", "-I 10.91.0.2 192.168.10.3", 2))
	if err := s.Remove("phone"); err != nil {
		t.Fatal(err)
	}
	fails(t, ping("device3", "192.168.10.3", 2))
	sh(t, ping("device2", "192.168.10.3", 5))
	if after := s.Facts().Peers[0]; !after.Handshake.Equal(before.Handshake) || after.Endpoint != before.Endpoint {
		t.Errorf("the peer that stayed is %+v, and was %+v", after, before)
	}
	if err := s.Remove("phone"); !errdefs.IsNotFound(err) {
		t.Errorf("removed twice: %v", err)
	}
}

// TestSetTwice: what is as it should be is left alone, and what somebody has changed is
// mended.
func TestSetTwice(t *testing.T) {
	network(t)
	d, err := Open(t.Context(), "vpn0", slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	c := Config{Key: key, Address: Address(subnet), Port: port, Peers: []Peer{{Name: "a", Key: other.Public(), Address: netip.MustParseAddr("10.91.0.2")}}}
	set := func(want bool) {
		t.Helper()
		changed, err := d.Set(c)
		if err != nil || changed != want {
			t.Errorf("changed: %v, %v, want %v", changed, err, want)
		}
	}
	set(true)
	set(false)
	shown := sh(t, "wg showconf vpn0; ip -4 -o addr show vpn0")
	for _, ruin := range []string{
		"ip addr del 10.91.0.1/24 dev vpn0", "ip addr add 10.92.0.1/24 dev vpn0", "wg set vpn0 listen-port 5000",
		"wg set vpn0 peer " + other.Public().String() + " remove", "wg genkey | wg pubkey | xargs -I K wg set vpn0 peer K allowed-ips 10.91.0.9/32",
		"wg set vpn0 peer " + other.Public().String() + " allowed-ips 0.0.0.0/0", "wg genkey | wg set vpn0 private-key /dev/stdin",
		"sysctl -qw net.ipv4.conf.vpn0.forwarding=0",
	} {
		sh(t, ruin)
		set(true)
		if got := sh(t, "wg showconf vpn0; ip -4 -o addr show vpn0"); got != shown {
			t.Errorf("after %s:\n%s\nand not\n%s", ruin, got, shown)
		}
		set(false)
	}
	// Another port that is somebody's is refused, and told.
	taken, err := net.ListenPacket("udp", "0.0.0.0:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	c.Port = 5353
	if _, err := d.Set(c); err == nil || !strings.Contains(err.Error(), "UDP port 5353") {
		t.Errorf("a port in use: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := link.Get("vpn0"); d.user != nil && !errdefs.IsNotFound(err) {
		t.Errorf("after Close: %v", err)
	}
	if err := link.Remove("vpn0"); err != nil {
		t.Error(err)
	}
}

// TestKilled: the tunnel goes on when the server's process was killed, and another one
// has begun.
func TestKilled(t *testing.T) {
	need.Time(t)
	network(t)
	dir := t.TempDir()
	s := server(dir)
	var laptop Client
	var kernel bool
	t.Run("add", func(t *testing.T) {
		start(t, s)
		laptop = admit(t, s, "laptop")
		kernel = s.Facts().Kernel
	})
	process := func() *exec.Cmd {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), serverEnv+"="+dir)
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Process.Kill(); c.Wait() })
		return c
	}
	first := process()
	connect(t, "device2", "laptop", laptop)
	eventually(t, ping("device2", "192.168.10.3", 1))
	for range 2 {
		if !kernel { // which knows places itself
			eventually(t, "sleep 0.1; grep -q 203.0.113.2 "+dir+"/places.json")
		}
		first.Process.Kill()
		first.Wait()
		began := time.Now()
		first = process()
		eventually(t, ping("device2", "192.168.10.3", 1))
		took := time.Since(began).Round(time.Millisecond)
		t.Logf("the tunnel was back after %s", took)
		if took > 10*time.Second { // alone the device finds out after 15
			t.Errorf("it took %s", took)
		}
	}
	// A device whose place is not known comes back by itself.
	first.Process.Kill()
	first.Wait()
	sh(t, "rm -f "+dir+"/places.json")
	process()
	eventually(t, ping("device2", "192.168.10.3", 1))
}

// TestTakenAway: somebody removes the interface, and it is made again.
func TestTakenAway(t *testing.T) {
	network(t)
	s := server(t.TempDir())
	start(t, s)
	sh(t, "ip link del vpn0")
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		i, err := link.Get("vpn0")
		if err == nil && i.Up && len(i.Addresses) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, %v", i, err)
		}
	}
}
