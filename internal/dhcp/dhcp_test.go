package dhcp

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"ingot/internal/link"
	"ingot/internal/need"
)

// TestMain runs the tests in network and mount namespaces of their own.
func TestMain(m *testing.M) {
	if os.Getenv("IN_NETNS") != "" {
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), "IN_NETNS=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if os.Getuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	if err := c.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var a = netip.MustParseAddr

func config(t testing.TB) Config {
	dir := t.TempDir()
	return Config{
		Interface: "srv", Server: a("192.168.10.2"), Subnet: netip.MustParsePrefix("192.168.10.0/25"),
		First: a("192.168.10.26"), Last: a("192.168.10.126"), Router: a("192.168.10.2"),
		DNS:       []netip.Addr{a("147.75.207.207"), a("147.75.207.208")},
		LeaseFile: filepath.Join(dir, "dhcpd.leases"), ConfigFile: filepath.Join(dir, "dhcpd.conf"), DefaultsFile: filepath.Join(dir, "defaults"),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// clientNamespace makes srv here and cli in a namespace of its own.
func clientNamespace(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	for _, argv := range []string{
		"ip netns del ingot-dhcp-test", "ip link del srv",
	} {
		exec.Command("sh", "-c", argv).Run()
	}
	sh(t, "ip netns add ingot-dhcp-test")
	t.Cleanup(func() { exec.Command("ip", "netns", "del", "ingot-dhcp-test").Run() })
	sh(t, "ip link add srv type veth peer name cli netns ingot-dhcp-test")
	t.Cleanup(func() { link.Remove("srv") })
	sh(t, "ip addr add 192.168.10.2/25 dev srv && ip link set srv up && ip -n ingot-dhcp-test link set cli up")
	return "ip netns exec ingot-dhcp-test "
}

func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func start(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Ready():
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	return s
}

func TestRealClients(t *testing.T) {
	in := clientNamespace(t)
	need.Binary(t, "dhclient")
	need.Binary(t, "busybox")
	c := config(t)
	s := start(t, c)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nenv | grep -E '^(ip|new_ip_address|router|new_routers|mask|dns|new_domain_name_servers|lease|new_dhcp_lease_time)='\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	got := sh(t, in+"busybox udhcpc -i cli -n -q -f -t 3 -s "+script+" -x hostname:box 2>&1")
	for _, want := range []string{"ip=192.168.10.26", "router=192.168.10.2", "mask=25", "dns=147.75.207.207 147.75.207.208", "lease=600"} {
		if !strings.Contains(got, want) {
			t.Errorf("udhcpc: no %q in\n%s", want, got)
		}
	}
	leases := filepath.Join(t.TempDir(), "leases")
	client := exec.Command("ip", "netns", "exec", "ingot-dhcp-test", "dhclient", "-4", "-1", "-d", "-q", "-sf", script, "-lf", leases, "-pf", "/dev/null", "cli")
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { client.Process.Kill(); client.Wait() }()
	deadline := time.Now().Add(20 * time.Second)
	for {
		b, _ := os.ReadFile(leases)
		if strings.Contains(string(b), "fixed-address 192.168.10.26;") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("dhclient did not get the same address:\n%s", b)
		}
		time.Sleep(10 * time.Millisecond)
	}
	all := s.Leases()
	if len(all) != 1 || all[0].State != Active {
		t.Errorf("leases: %+v", all)
	}
	onDisk, err := ReadLeases(c.LeaseFile)
	if err != nil || len(onDisk) != 1 || onDisk[0].IP != all[0].IP {
		t.Errorf("on disk: %+v, %v", onDisk, err)
	}
}

func TestExportsAreThePages(t *testing.T) {
	c := config(t)
	c.Interface = "bond0.1000"
	want := `default-lease-time 600;
max-lease-time 7200;
authoritative;

subnet 192.168.10.0 netmask 255.255.255.128 {
  range 192.168.10.26 192.168.10.126;
  option routers 192.168.10.2;
  option domain-name-servers 147.75.207.207, 147.75.207.208;
}
`
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.export(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(c.ConfigFile); string(got) != want {
		t.Errorf("got\n%s", got)
	}
	if got, _ := os.ReadFile(c.DefaultsFile); string(got) != "INTERFACESv4=\"bond0.1000\"\n" {
		t.Errorf("got %s", got)
	}
}

func table(t *testing.T, change func(*Config)) (*Server, *time.Time) {
	t.Helper()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	c := config(t)
	c.Now = func() time.Time { return now }
	if change != nil {
		change(&c)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s, &now
}

func mac(n byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, n} }

func message(t *testing.T, kind dhcpv4.MessageType, m net.HardwareAddr, more ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	p, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(m), dhcpv4.WithMessageType(kind)}, more...)...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func want(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
}

func ack(t *testing.T, s *Server, n byte, more ...dhcpv4.Modifier) string {
	t.Helper()
	offer, _, _ := s.handle(message(t, dhcpv4.MessageTypeDiscover, mac(n), more...))
	if offer == nil {
		return ""
	}
	answer, text, _ := s.handle(message(t, dhcpv4.MessageTypeRequest, mac(n), want(offer.YourIPAddr.String()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{192, 168, 10, 2}))))
	if answer.MessageType() != dhcpv4.MessageTypeAck || len(text) == 0 {
		t.Fatalf("%s, %d bytes to log", answer.MessageType(), len(text))
	}
	return answer.YourIPAddr.String()
}

func TestAddressesStick(t *testing.T) {
	s, now := table(t, func(c *Config) { c.Last = a("192.168.10.27") })
	first, second := ack(t, s, 1), ack(t, s, 2)
	if first != "192.168.10.26" || second != "192.168.10.27" {
		t.Fatalf("got %s, %s", first, second)
	}
	if got := ack(t, s, 3); got != "" {
		t.Errorf("the range is used up, and %s was given", got)
	}
	*now = now.Add(time.Hour) // all have expired
	if got := ack(t, s, 2); got != second {
		t.Errorf("the second client got %s, not its old address", got)
	}
	if got := ack(t, s, 3); got != first {
		t.Errorf("a new client got %s, not the one longest unused", got)
	}
}

func TestRequestStates(t *testing.T) {
	s, _ := table(t, nil)
	ip := ack(t, s, 1)
	other := dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{192, 168, 10, 9}))
	for name, c := range map[string]struct {
		m    *dhcpv4.DHCPv4
		want dhcpv4.MessageType
	}{
		"init-reboot":               {message(t, dhcpv4.MessageTypeRequest, mac(1), want(ip)), dhcpv4.MessageTypeAck},
		"renewing":                  {message(t, dhcpv4.MessageTypeRequest, mac(1), dhcpv4.WithClientIP(net.ParseIP(ip))), dhcpv4.MessageTypeAck},
		"somebody else's":           {message(t, dhcpv4.MessageTypeRequest, mac(2), want(ip)), dhcpv4.MessageTypeNak},
		"another network":           {message(t, dhcpv4.MessageTypeRequest, mac(1), want("10.0.0.7")), dhcpv4.MessageTypeNak},
		"the server's own":          {message(t, dhcpv4.MessageTypeRequest, mac(1), want("192.168.10.2")), dhcpv4.MessageTypeNak},
		"below the range":           {message(t, dhcpv4.MessageTypeRequest, mac(3), want("192.168.10.25")), dhcpv4.MessageTypeNak},
		"another server's offer":    {message(t, dhcpv4.MessageTypeRequest, mac(1), want(ip), other), dhcpv4.MessageTypeNone},
		"inform":                    {message(t, dhcpv4.MessageTypeInform, mac(9), dhcpv4.WithClientIP(net.IP{192, 168, 10, 3})), dhcpv4.MessageTypeAck},
		"a free one of init-reboot": {message(t, dhcpv4.MessageTypeRequest, mac(4), want("192.168.10.99")), dhcpv4.MessageTypeAck},
	} {
		t.Run(name, func(t *testing.T) {
			answer, _, _ := s.handle(c.m)
			got := dhcpv4.MessageTypeNone
			if answer != nil {
				got = answer.MessageType()
			}
			if got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestDeclinedAddressIsLeftAlone(t *testing.T) {
	s, now := table(t, nil)
	ip := ack(t, s, 1)
	s.handle(message(t, dhcpv4.MessageTypeDecline, mac(1), want(ip)))
	if got := ack(t, s, 1); got == ip {
		t.Error("the client got the address that it declined")
	}
	*now = now.Add(2 * declineTime)
	if !s.free(a(ip), mac(7)) {
		t.Error("it is never given again")
	}
}

func TestReservationAndRestart(t *testing.T) {
	clientNamespace(t)
	c := config(t)
	s := start(t, c)
	if _, err := s.Reserve(mac(1), a("192.168.10.50")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(mac(2), a("192.168.10.50")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("reserve it twice: %v", err)
	}
	again, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if got := ack(t, again, 1); got != "192.168.10.50" {
		t.Errorf("got %s", got)
	}
	if got := ack(t, again, 3, want("192.168.10.50")); got == "192.168.10.50" {
		t.Error("a reserved address was given to another card")
	}
}

func TestLogRoundTrip(t *testing.T) {
	l := Lease{
		IP: a("192.168.10.26"), MAC: mac(1), ClientID: []byte{1, 0, '"', '\\'}, Hostname: `we"ird`,
		Starts: time.Unix(1700000000, 0).UTC(), Ends: time.Unix(1700000600, 0).UTC(), State: Active,
	}
	text := string(formatLease(l)) + string(formatReservation(mac(2), a("192.168.10.50")))
	for cut := range len(text) + 1 { // torn anywhere
		b := parseBook(text[:cut])
		whole := len(formatLease(l)) - 1 // without the last newline
		if got, ok := b.leases[l.IP]; ok != (cut >= whole) || ok && (got.Hostname != l.Hostname || string(got.ClientID) != string(l.ClientID) || !got.Ends.Equal(l.Ends)) {
			t.Fatalf("cut at %d: %v, %+v", cut, ok, got)
		}
	}
	if b := parseBook(text); b.reserved[string(mac(2))] != a("192.168.10.50") {
		t.Errorf("reservation lost: %+v", b)
	}
}

func TestReadsDhcpdsOwnLog(t *testing.T) {
	b := parseBook(`# The format of this file is documented in the dhcpd.leases(5) manual page.
authoring-byte-order little-endian;
server-duid "\000\001\000\001*\344";
lease 192.168.10.30 {
  starts 5 2022/10/28 10:40:00;
  ends never;
  cltt 5 2022/10/28 10:40:00;
  binding state active;
  next binding state free;
  rewind binding state free;
  hardware ethernet aa:35:eb:d4:61:b1;
  uid "\001\2525\353\324a\261";
  set vendor-class-identifier = "x";
  on expiry { execute("a", "b;}"); }
  client-hostname "mvm0";
}
`)
	l, ok := b.leases[a("192.168.10.30")]
	if !ok || l.Hostname != "mvm0" || l.MAC.String() != "aa:35:eb:d4:61:b1" || l.Ends.Year() != 9999 {
		t.Errorf("got %+v", b)
	}
}

func FuzzParseBook(f *testing.F) {
	f.Add(string(formatLease(Lease{IP: a("1.2.3.4"), MAC: mac(1), Hostname: "x", State: Active})))
	f.Add("lease 1.2.3.4 { hardware ethernet 02:00:00:00:00:01; uid \"\\")
	f.Add("host x{fixed-address 1.2.3.4;hardware ethernet 02:00:00:00:00:01;}")
	f.Fuzz(func(t *testing.T, text string) {
		for ip, l := range parseBook(text).leases {
			again := parseBook(string(formatLease(l)))
			if got, ok := again.leases[ip]; !ok || got.Hostname != l.Hostname || string(got.ClientID) != string(l.ClientID) {
				t.Errorf("%+v became %+v", l, got)
			}
		}
	})
}

func FuzzPacket(f *testing.F) {
	p, _ := dhcpv4.NewDiscovery(mac(1))
	f.Add(p.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil || len(m.ClientHWAddr) != 6 {
			t.Skip()
		}
		c := config(t)
		s, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		s.handle(m)
		if answer, _, _ := s.handle(m); answer != nil {
			answer.ToBytes()
		}
	})
}
