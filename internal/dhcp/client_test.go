package dhcp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/need"
)

// script makes a script that clients call with their lease.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// background starts a program that runs until the test ends, and returns what it says.
func background(t *testing.T, line string) *output {
	t.Helper()
	var out output
	c := exec.Command("sh", "-c", "exec "+line)
	c.Stdout, c.Stderr = &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// What it has started, as dhcpcd does, may hold its output longer than it lives.
	c.WaitDelay = time.Second
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Asked first, since only it knows what it has started elsewhere.
		c.Process.Signal(syscall.SIGTERM)
		asked := time.AfterFunc(time.Second, func() { c.Process.Kill() })
		c.Wait()
		asked.Stop()
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
	})
	return &out
}

// output is written by one goroutine and read by others.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// only is the one lease of a card, by its last byte; nil if there is none.
func only(s *Server, m net.HardwareAddr) *Lease {
	all := s.Leases()
	i := slices.IndexFunc(all, func(l Lease) bool { return l.MAC.String() == m.String() })
	if i < 0 {
		return nil
	}
	return &all[i]
}

func cardOf(t *testing.T, name string) net.HardwareAddr {
	t.Helper()
	m, err := net.ParseMAC(strings.TrimSpace(sh(t, in+"cat /sys/class/net/"+name+"/address")))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestUdhcpc(t *testing.T) {
	need.Binary(t, "busybox")
	segment(t)
	c := config(t)
	s, _ := start(t, c)
	show := script(t, "[ -z $ip ] || ip addr replace $ip/25 dev cli; env | grep -E '^(ip|router|mask|dns|lease)='")
	got := sh(t, in+"busybox udhcpc -i cli -n -q -f -t 3 -s "+show+" -x hostname:box 2>&1")
	for _, want := range []string{"ip=192.168.10.26", "router=192.168.10.2", "mask=25", "dns=147.75.207.207 147.75.207.208", "lease=600"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	card := cardOf(t, "cli")
	sh(t, in+"timeout 2 busybox udhcpc -i cli -n -f -t 3 -R -s "+show+" 2>&1 || true") // it releases when it is told to end
	eventually(t, "it is released", func() bool { return only(s, card).State == Released })
	sh(t, in+"busybox udhcpc -i cli -n -q -f -t 3 -s "+show+" -x hostname:box 2>&1")
	onDisk, err := ReadLeases(c.LeaseFile)
	if err != nil || len(onDisk) != 1 || onDisk[0].IP != a("192.168.10.26") || onDisk[0].State != Active || onDisk[0].Hostname != "box" {
		t.Errorf("on disk: %+v, %v", onDisk, err)
	}
}

// dhclient renews at half of the lease: a short one shows all states.
func TestDhclientRenewsAndReboots(t *testing.T) {
	need.Binary(t, "dhclient")
	segment(t)
	c := config(t)
	c.MinLease, c.DefaultLease = time.Second, 4*time.Second
	s, stop := start(t, c)
	leases, set := filepath.Join(t.TempDir(), "leases"), script(t, "[ -z $new_ip_address ] || ip addr replace $new_ip_address/25 dev cli")
	line := in + "dhclient -4 -1 -d -v -sf " + set + " -lf " + leases + " -pf /dev/null cli"
	out := background(t, line)
	eventually(t, "it is bound", func() bool { return strings.Contains(out.String(), "bound to 192.168.10.26") })
	card := cardOf(t, "cli")
	first := only(s, card)
	eventually(t, "it renews", func() bool { return only(s, card).Ends.After(first.Ends) })
	stop()
	if onDisk, err := ReadLeases(c.LeaseFile); err != nil || len(onDisk) != 1 {
		t.Fatalf("on disk: %+v, %v", onDisk, err)
	}
	again, _ := start(t, c)
	before := only(again, card)
	eventually(t, "it renews or rebinds after a restart of the server", func() bool { return only(again, card).Ends.After(before.Ends) })
	reboot := background(t, line)
	eventually(t, "it asks for what it had", func() bool { return strings.Contains(reboot.String(), "DHCPREQUEST for 192.168.10.26") })
	eventually(t, "it is bound again", func() bool { return strings.Contains(reboot.String(), "bound to 192.168.10.26") })
}

func TestDhcpcd(t *testing.T) {
	need.Binary(t, "dhcpcd")
	segment(t)
	s, _ := start(t, config(t))
	conf := filepath.Join(t.TempDir(), "dhcpcd.conf")
	if err := os.WriteFile(conf, []byte("clientid\noption classless_static_routes, domain_name_servers, routers\nrequire dhcp_server_identifier\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := background(t, in+"dhcpcd -4 -B -f "+conf+" -c /bin/true cli")
	eventually(t, "it is leased an address: "+out.String(), func() bool { return strings.Contains(out.String(), "leased 192.168.10.26 for 600 seconds") })
	if l := only(s, cardOf(t, "cli")); l == nil || l.State != Active || len(l.ClientID) == 0 {
		t.Errorf("got %+v", l)
	}
}

// A relay in the client's namespace serves a segment behind it.
func TestRealRelay(t *testing.T) {
	need.Binary(t, "dhcrelay")
	need.Binary(t, "busybox")
	segment(t)
	sh(t, `ip netns add far && ip link add inner netns client type veth peer name cli netns far
		ip -n client addr add 192.168.10.5/25 dev cli; ip -n client addr add 10.7.0.1/24 dev inner; ip -n client link set inner up
		ip -n far link set cli up; ip route add 10.7.0.0/24 via 192.168.10.5`)
	t.Cleanup(func() { sh(t, "ip netns del far") })
	c := config(t)
	c.Subnets = append(c.Subnets, Subnet{
		Prefix: netip.MustParsePrefix("10.7.0.0/24"), Ranges: []Range{{a("10.7.0.10"), a("10.7.0.20")}},
		Options: Options{Routers: []netip.Addr{a("10.7.0.1")}},
	})
	s, _ := start(t, c)
	out := background(t, in+"dhcrelay -4 -d -a -iu cli -id inner 192.168.10.2")
	eventually(t, "the relay listens", func() bool { return strings.Contains(out.String(), "Sending on   Socket/fallback") })
	show := script(t, "env | grep -E '^(ip|router|lease)='")
	got := sh(t, "ip netns exec far busybox udhcpc -i cli -n -q -f -t 5 -s "+show+" 2>&1")
	if !strings.Contains(got, "ip=10.7.0.10") || !strings.Contains(got, "router=10.7.0.1") {
		t.Errorf("got\n%s\n%s", got, out)
	}
	if all := s.Leases(); len(all) != 1 || all[0].IP != a("10.7.0.10") || all[0].State != Active {
		t.Errorf("leases: %+v", all)
	}
}

func TestLogHasThePagesLines(t *testing.T) {
	segment(t)
	var log output
	c := config(t)
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	start(t, c)
	srv, err := net.InterfaceByName("srv")
	if err != nil {
		t.Fatal(err)
	}
	card := srv.HardwareAddr.String()
	rest := log.String()
	for _, want := range []string{
		"Wrote 0 leases to leases file.", "Listening on LPF/srv/" + card + "/192.168.10.0/25",
		"Sending on   LPF/srv/" + card + "/192.168.10.0/25", "Sending on   Socket/fallback/fallback-net", "Server starting service.",
	} {
		_, after, found := strings.Cut(rest, `msg="`+want+`"`)
		if !found {
			t.Errorf("no %q, or not in order, in\n%s", want, log.String())
			continue
		}
		rest = after
	}
}

func TestReservationAndReleaseOnDisk(t *testing.T) {
	segment(t)
	c := config(t)
	s, stop := start(t, c)
	if _, err := s.Reserve(Reservation{MAC: mac(1), IP: a("192.168.10.50")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(Reservation{MAC: mac(2), IP: a("192.168.10.50")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("reserve it twice: %v", err)
	}
	// Outside of the subnet, and in it the network's, the server's, the broadcast.
	for ip, says := range map[string]string{
		"10.9.9.9": "ip: it is not in 192.168.10.0/25", "fd00::1": "ip: it is not in 192.168.10.0/25",
		"192.168.10.0": "ip: it is not for clients in 192.168.10.0/25", "192.168.10.2": "ip: it is not for", "192.168.10.127": "ip: it is not for",
	} {
		if _, err := s.Reserve(Reservation{MAC: mac(2), IP: a(ip)}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("reserve %s: %v", ip, err)
		}
	}
	if l, err := s.Reserve(Reservation{MAC: mac(4)}); err != nil || l.IP != a("192.168.10.26") {
		t.Errorf("reserve any: %+v, %v", l, err)
	}
	if err := s.Unreserve(Reservation{IP: a("192.168.10.26")}); err != nil {
		t.Error(err)
	}
	if got := ack(t, s, 9, want("192.168.10.26")); got != "192.168.10.26" {
		t.Errorf("what was reserved once is not given again: %s", got)
	}
	if err := s.Release(a("192.168.10.26")); err != nil {
		t.Error(err)
	}
	if err := s.Release(a("192.168.10.26")); !errdefs.IsNotFound(err) {
		t.Errorf("release it twice: %v", err)
	}
	if onDisk, err := ReadLeases(c.LeaseFile); err != nil || len(onDisk) != 1 || onDisk[0].State != Released {
		t.Errorf("on disk: %+v, %v", onDisk, err)
	}
	stop()
	again := loaded(t, c)
	if got := ack(t, again, 1); got != "192.168.10.50" {
		t.Errorf("got %s", got)
	}
	if got := ack(t, again, 3, want("192.168.10.50")); got == "192.168.10.50" {
		t.Error("a reserved address was given to another card")
	}
	if got := ack(t, again, 9); got != "192.168.10.26" {
		t.Errorf("after its release and a restart, a client got %s", got)
	}
}

// What isc-dhcp-server's script shows of a server that runs is true: the end
// after a renewal, and no lease that was released.
func TestScriptShowsTheTruth(t *testing.T) {
	need.Binary(t, "dhcp-lease-list")
	segment(t)
	sh(t, "ip -n client addr add 192.168.10.5/25 dev cli")
	c := config(t)
	s, _ := start(t, c)
	l := newLoad(t, "192.168.10.5", "192.168.10.2")
	l.run(1, 50*time.Millisecond)
	ip := l.acked[l.card(1)]
	first := leaseList(t, c.LeaseFile)
	if ip == 0 || !strings.Contains(first, "IP "+ip.String()+" ") {
		t.Fatalf("%s was acknowledged, and shown is\n%s", ip, first)
	}
	time.Sleep(time.Second) // the end differs by the second
	l.say(kindRequest, 1, 0, ip)
	eventually(t, "it is renewed", func() bool { return s.Facts().Acks > uint64(l.exchanges) })
	card := l.card(1)
	end := "END " + only(s, card[:]).Ends.Format("2006-01-02 15:04:05")
	if strings.Contains(first, end) {
		t.Fatalf("the renewal changed nothing: %s", end)
	}
	eventually(t, "the new end is shown", func() bool {
		return strings.Contains(leaseList(t, c.LeaseFile), "IP "+ip.String()+" HOSTNAME -NA- BEGIN "+only(s, card[:]).Starts.Format("2006-01-02 15:04:05")+" "+end)
	})
	l.say(kindRelease, 1, 0, ip)
	eventually(t, "the released lease is not shown", func() bool { return !strings.Contains(leaseList(t, c.LeaseFile), "IP "+ip.String()+" ") })
}

// Two servers never have one log, nor one interface.
func TestSecondServerWaitsForTheFirst(t *testing.T) {
	segment(t)
	c := config(t)
	first, stop := start(t, c)
	other := config(t)
	for name, c := range map[string]Config{"log": c, "interface": other} {
		s, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if err := s.Run(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with the same %s, a second server ended with %v", name, err)
		}
		cancel()
	}
	if _, err := first.Reserve(Reservation{MAC: mac(1), IP: a("192.168.10.50")}); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, stop)
	second, _ := start(t, c)
	if l := only(second, mac(1)); l == nil || l.IP != a("192.168.10.50") {
		t.Errorf("the second server has %+v", second.Leases())
	}
}
