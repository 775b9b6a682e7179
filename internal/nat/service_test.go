package nat_test

import (
	"bufio"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/nat"
)

// answer serves on an address until the test ends: a line to each that asks.
func answer(t *testing.T, network, address string) {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan bool)
		go func() {
			defer close(done)
			b := make([]byte, 100)
			for {
				_, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				c.WriteTo([]byte("here\n"), from)
			}
		}()
		t.Cleanup(func() { c.Close(); <-done })
		return
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, "here")
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// reaches asks from a namespace, empty for the test's own, by a source address,
// empty for any.
func reaches(ns, source, network, address string, within time.Duration) bool {
	result := make(chan bool)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if ns != "" && enter(ns) != nil {
			result <- false
			return
		}
		d := net.Dialer{Timeout: within}
		if ip := net.ParseIP(source); ip != nil && network == "udp" {
			d.LocalAddr = &net.UDPAddr{IP: ip}
		} else if ip != nil {
			d.LocalAddr = &net.TCPAddr{IP: ip}
		}
		c, err := d.Dial(network, address) // an address is dialled on this thread
		if err != nil {
			result <- false
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(within))
		fmt.Fprintln(c, "who is there")
		line, _ := bufio.NewReader(c).ReadString('\n')
		result <- line == "here\n"
	}()
	return <-result
}

// enter puts this thread into a namespace.
func enter(ns string) error {
	fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNET)
}

// in calls f on a thread that is in a namespace.
func in(t *testing.T, ns string, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // as in reaches
		err := enter(ns)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

type attempt struct {
	ns, source, network, address string
	want                         bool
}

func try(t *testing.T, attempts []attempt) {
	t.Helper()
	for _, a := range attempts {
		within := 20 * time.Second
		if !a.want {
			within = 200 * time.Millisecond
		}
		if got := reaches(a.ns, a.source, a.network, a.address, within); got != a.want {
			t.Errorf("%s of %q reaches %s %s: %v", a.source, a.ns, a.network, a.address, got)
		}
	}
}

// wire joins this namespace to a new one, where the other end is eth0.
func wire(t *testing.T, device string) (ns string) {
	t.Helper()
	ns = newNamespace(t)
	ip(t, "link add "+device+" type veth peer name eth0 netns "+ns)
	t.Cleanup(func() { exec.Command("ip", "link", "del", device).Run() })
	ip(t, "link set "+device+" up")
	ip(t, "-n "+ns+" link set eth0 up")
	return ns
}

// TestHubServes: who reaches what the hub serves on the segment.
func TestHubServes(t *testing.T) {
	needs(t)
	ip(t, "link set lo up")
	inside, outside := wire(t, hub.Inside), wire(t, hub.Outside)
	ip(t, "addr add 192.168.10.2/25 dev "+hub.Inside)
	ip(t, "-n "+inside+" addr add 192.168.10.3/25 dev eth0")
	ip(t, "-n "+inside+" addr add 192.168.10.30/25 dev eth0")
	ip(t, "addr add 100.64.0.2/30 dev "+hub.Outside)
	ip(t, "addr add 100.64.5.2/24 dev "+hub.Outside)
	ip(t, "-n "+outside+" addr add 100.64.0.1/30 dev eth0")
	ip(t, "-n "+outside+" addr add 100.64.5.9/24 dev eth0")
	ip(t, "-n "+outside+" route add 192.168.10.0/25 via 100.64.0.2")
	const grpc, images, names, own = "192.168.10.2:9091", "192.168.10.2:5000", "192.168.10.2:53", "100.64.5.2:5000"
	for _, address := range []string{grpc, images, names, own} {
		answer(t, "tcp", address)
	}
	answer(t, "udp", names)
	const machine, guest, trusted, neighbour = "192.168.10.3", "192.168.10.30", "100.64.0.1", "100.64.5.9"
	attempts := []attempt{
		{"", "", "tcp", grpc, true},
		{inside, machine, "tcp", grpc, true},
		{outside, trusted, "tcp", grpc, true},
		{inside, guest, "tcp", grpc, false},
		{outside, neighbour, "tcp", grpc, false},
		{inside, guest, "tcp", images, true},
		{outside, trusted, "tcp", images, true},
		{outside, neighbour, "tcp", images, false},
		{inside, guest, "udp", names, true},
		{inside, guest, "tcp", names, true},
		{outside, trusted, "udp", names, true},
		{outside, neighbour, "udp", names, false},
		{outside, neighbour, "tcp", names, false},
		{outside, neighbour, "tcp", own, true}, // not the segment's business
	}
	if err := nat.SetHub(hub); err != nil {
		t.Fatal(err)
	}
	defer nat.Remove(nat.Table)
	try(t, attempts)
	h := hub
	h.Trusted = nat.Hub{}.Trusted
	if err := nat.SetHub(h); err != nil {
		t.Fatal(err)
	}
	try(t, []attempt{{outside, trusted, "tcp", grpc, false}, {inside, machine, "tcp", grpc, true}})
	nat.Remove(nat.Table)
	for i := range attempts {
		attempts[i].want = true // by the rules only
	}
	try(t, attempts)
}

// TestHostServes: who reaches the host's API and metrics, which listen on all addresses.
func TestHostServes(t *testing.T) {
	needs(t)
	ip(t, "link set lo up")
	h := exampleHost()
	inside, elsewhere := wire(t, h.Segment), wire(t, "lan0")
	ip(t, "addr add 192.168.10.3/25 dev "+h.Segment)
	ip(t, "addr add fe80::3/64 dev "+h.Segment+" nodad")
	ip(t, "-n "+inside+" addr add 192.168.10.2/25 dev eth0")
	ip(t, "-n "+inside+" addr add 192.168.10.30/25 dev eth0")
	ip(t, "-n "+inside+" addr add fe80::30/64 dev eth0 nodad")
	ip(t, "addr add 10.9.0.1/24 dev lan0")
	ip(t, "addr add 100.64.0.2/30 dev lan0")
	ip(t, "-n "+elsewhere+" addr add 10.9.0.2/24 dev eth0")
	ip(t, "-n "+elsewhere+" addr add 100.64.0.1/30 dev eth0")
	ip(t, "-n "+elsewhere+" route add 192.168.10.0/25 via 10.9.0.1")
	var attempts []attempt
	for _, port := range []string{"9090", "9092"} {
		answer(t, "tcp", ":"+port)
		attempts = append(attempts, []attempt{
			{"", "", "tcp", "192.168.10.3:" + port, true},
			{inside, "192.168.10.2", "tcp", "192.168.10.3:" + port, true},
			{elsewhere, "100.64.0.1", "tcp", "192.168.10.3:" + port, true},
			{inside, "192.168.10.30", "tcp", "192.168.10.3:" + port, false},
			{inside, "", "tcp", "[fe80::3%eth0]:" + port, false},
			{elsewhere, "10.9.0.2", "tcp", "192.168.10.3:" + port, false},
			{elsewhere, "10.9.0.2", "tcp", "10.9.0.1:" + port, false},
		}...)
	}
	if _, err := nat.OpenGuard(h); err != nil {
		t.Fatal(err)
	}
	defer nat.Remove(nat.Table)
	try(t, attempts)
	nat.Remove(nat.Table)
	for i := range attempts {
		attempts[i].want = true
	}
	try(t, attempts)
}

// TestMetadataInterface: on an operator's own network, too, a guest reaches nothing
// but its metadata by the interface that it has for them.
func TestMetadataInterface(t *testing.T) {
	needs(t)
	guest := wire(t, guestTap)
	ip(t, "link add lan0 type bridge")
	t.Cleanup(func() { exec.Command("ip", "link", "del", "lan0").Run() })
	ip(t, "link set lan0 up")
	ip(t, "addr add 10.9.0.1/24 dev lan0")
	ip(t, "addr add 169.254.169.254/32 peer 169.254.0.1/32 dev "+guestTap)
	ip(t, "-n "+guest+" addr add 169.254.0.1/16 dev eth0")
	ip(t, "-n "+guest+" route add 10.9.0.1/32 dev eth0")
	answer(t, "tcp", ":80")
	answer(t, "tcp", ":9090")
	attempts := []attempt{
		{guest, "", "tcp", "169.254.169.254:80", true},
		{guest, "", "tcp", "169.254.169.254:9090", false},
		{guest, "", "tcp", "10.9.0.1:80", false},
		{guest, "", "tcp", "10.9.0.1:9090", false},
	}
	g, err := nat.OpenGuard(nat.Host{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set(otherTap, nat.Guest{MAC: otherMAC}); err != nil { // which it does not guard there
		t.Fatal(err)
	}
	defer nat.Remove(nat.Table)
	try(t, attempts)
	nat.Remove(nat.Table)
	for i := range attempts {
		attempts[i].want = true
	}
	try(t, attempts)
}
