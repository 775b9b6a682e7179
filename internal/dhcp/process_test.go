package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const serverEnv = "INGOT_DHCP_SERVER"

// serverLine is the command line of a server in a process of its own, with its files
// beside that of its leases. It says `serving` once it does.
func serverLine(t testing.TB, iface, address, prefix, first, last, leases string) string {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("env %s='%s %s %s %s %s %s' %s", serverEnv, iface, address, prefix, first, last, leases, binary)
}

// serve is what serverLine runs.
func serve(line string) error {
	words := strings.Fields(line)
	if len(words) != 6 {
		return fmt.Errorf("%s: %q has not 6 words", serverEnv, line)
	}
	c := configIn(filepath.Dir(words[5]))
	c.Interface, c.Server, c.LeaseFile = words[0], a(words[1]), words[5]
	c.Subnets[0].Prefix = netip.MustParsePrefix(words[2])
	c.Subnets[0].Ranges = []Range{{a(words[3]), a(words[4])}}
	c.Subnets[0].Options.Routers = []netip.Addr{c.Server}
	c.Settle = 20 * time.Millisecond
	began := time.Now()
	s, err := New(c)
	if err != nil {
		return err
	}
	go func() {
		<-s.Ready()
		fmt.Printf("serving %d leases after %s\n", len(s.leases), time.Since(began))
	}()
	return errors.Join(s.Run(context.Background()), errors.New("the server has ended"))
}
