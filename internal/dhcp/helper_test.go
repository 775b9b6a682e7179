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
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"ingot/internal/need"
	"ingot/internal/tests"
)

// TestMain runs the tests where /run is empty, since named network namespaces are
// pinned there; or a server.
func TestMain(m *testing.M) {
	if line := os.Getenv(serverEnv); line != "" {
		fmt.Fprintln(os.Stderr, serve(line))
		os.Exit(1)
	}
	tests.Apart(m, tests.Fresh("tmpfs", "/run"))
}

var a = netip.MustParseAddr

func config(t testing.TB) Config {
	t.Helper()
	return configIn(t.TempDir())
}

func configIn(dir string) Config {
	return Config{
		Interface: "srv", Server: a("192.168.10.2"), Authoritative: true,
		Subnets: []Subnet{{
			Prefix: netip.MustParsePrefix("192.168.10.0/25"),
			Ranges: []Range{{a("192.168.10.26"), a("192.168.10.126")}},
			Options: Options{
				Routers: []netip.Addr{a("192.168.10.2")},
				DNS:     []netip.Addr{a("147.75.207.207"), a("147.75.207.208")},
			},
		}},
		LeaseFile: filepath.Join(dir, "dhcpd.leases"), ConfigFile: filepath.Join(dir, "dhcpd.conf"), DefaultsFile: filepath.Join(dir, "defaults"),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// last ends the range of the first subnet.
func last(c *Config, ip string) { c.Subnets[0].Ranges[0].Last = a(ip) }

const in = "ip netns exec client "

// segment makes srv here and cli in the namespace `client`.
func segment(t testing.TB) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	sh(t, "ip link set lo up; ip netns add client; ip link add srv type veth peer name cli netns client")
	t.Cleanup(func() { sh(t, "ip netns del client; ip link del srv 2>/dev/null || true") })
	sh(t, "ip addr add 192.168.10.2/25 dev srv && ip link set srv up && ip -n client link set lo up && ip -n client link set cli up")
}

func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// start runs a server until the test ends, or the returned function is called.
func start(t testing.TB, c Config) (*Server, func()) {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-s.Ready():
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	return s, stop
}

// eventually waits until ok is true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func mac(n byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, n} }

// message is made by another implementation than ours.
func newMessage(t testing.TB, kind dhcpv4.MessageType, m net.HardwareAddr, more ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
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

func server(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(ip)))
}

func clientID(id string) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.OptionClientIdentifier, []byte(id))
}

// exchange gives a message to the table, and reads the answer with another
// implementation. It is nil if there is none.
func exchange(t testing.TB, s *Server, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, reply, string) {
	t.Helper()
	parsed, err := parse(m.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	var out reply
	_, text := s.handle(&parsed, &out, nil)
	if len(out.b) == 0 {
		return nil, out, string(text)
	}
	answer, err := dhcpv4.FromBytes(out.b)
	if err != nil {
		t.Fatalf("answer to %s: %v\n%x", m.MessageType(), err, out.b)
	}
	if answer.TransactionID != m.TransactionID || answer.ClientHWAddr.String() != m.ClientHWAddr.String() {
		t.Fatalf("answer to %s is not for it:\n%s", m.MessageType(), answer.Summary())
	}
	return answer, out, string(text)
}

// ack gets an address by DISCOVER and REQUEST; none if there is no offer.
func ack(t testing.TB, s *Server, n byte, more ...dhcpv4.Modifier) string {
	t.Helper()
	offer, _, _ := exchange(t, s, newMessage(t, dhcpv4.MessageTypeDiscover, mac(n), more...))
	if offer == nil {
		return ""
	}
	more = append(more, dhcpv4.WithOption(dhcpv4.OptServerIdentifier(offer.ServerIdentifier())), want(offer.YourIPAddr.String()))
	answer, _, text := exchange(t, s, newMessage(t, dhcpv4.MessageTypeRequest, mac(n), more...))
	if answer.MessageType() != dhcpv4.MessageTypeAck || len(text) == 0 {
		t.Fatalf("%s, %d bytes to log", answer.MessageType(), len(text))
	}
	return answer.YourIPAddr.String()
}

// table is a server that does not run, and its clock.
func table(t testing.TB, change func(*Config)) (*Server, *time.Time) {
	t.Helper()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	c := config(t)
	c.Now = func() time.Time { return now }
	if change != nil {
		change(&c)
	}
	return loaded(t, c), &now
}

// loaded is a server that has read its log, and does not run.
func loaded(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := New(c)
	if err == nil {
		err = s.load()
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func mustAddr(ip net.IP) netip.Addr {
	b, _ := netip.AddrFromSlice(ip.To4())
	return b
}
