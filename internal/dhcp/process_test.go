package dhcp

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// serverLine is the command line of a server in a process of its own. It says
// `serving` once it does.
func serverLine(t testing.TB, iface, address, prefix, first, last, leases string) string {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("env IN_NETNS=again INGOT_DHCP_SERVER='%s %s %s %s %s %s' %s -test.run ^TestServerProcess$ -test.v",
		iface, address, prefix, first, last, leases, binary)
}

// TestServerProcess is what serverLine runs.
func TestServerProcess(t *testing.T) {
	words := strings.Fields(os.Getenv("INGOT_DHCP_SERVER"))
	if len(words) != 6 {
		t.Skip("it is a process of other tests")
	}
	c := config(t)
	c.Interface, c.Server, c.LeaseFile = words[0], a(words[1]), words[5]
	c.Subnets[0].Prefix = netip.MustParsePrefix(words[2])
	c.Subnets[0].Ranges = []Range{{a(words[3]), a(words[4])}}
	c.Subnets[0].Options.Routers = []netip.Addr{c.Server}
	c.Settle = 20 * time.Millisecond
	began := time.Now()
	s, _ := start(t, c)
	fmt.Printf("serving %d leases after %s\n", len(s.leases), time.Since(began))
	select {}
}
