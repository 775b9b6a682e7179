package hub

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/need"
	"ingot/internal/tests"
)

// twoMachines are the hub and a host, which is silent.
const twoMachines = "machines: [{name: network-hub, address: 192.168.10.2}, {name: host-0, address: 192.168.10.3, host: true}]\n"

// allOfDHCP is what a hub's configuration can say of DHCP.
const allOfDHCP = `dhcp:
  ranges: [{first: 192.168.10.10, last: 192.168.10.11}]
  exclude: [192.168.10.26/31]
  lease: {default: 20m, min: 5m, max: 1h}
  dns: [9.9.9.9]
  domain: example.org
  ntp: [192.168.10.4]
  mtu: 1400
  routes: [{to: 10.8.0.0/14, via: 192.168.10.5}]
  options: [{code: 66, value: [tftp.example.org]}, {code: 224, type: hex, value: [07ff]}]
  subnets:
  - subnet: 10.7.0.0/24
    ranges: [{first: 10.7.0.10, last: 10.7.0.20}]
    lease: {default: 30m}
    routers: [10.7.0.1]
    dns: [192.168.10.2]
    options: [{code: 67, value: [boot]}]
reservations:
- {mac: "02:00:00:00:00:0a", address: 192.168.10.100}
- {client-id: "01:02:03", address: 192.168.10.101}
- {microvm: default/web, address: 192.168.10.102}
- {mac: "02:00:00:00:00:0b", address: 10.7.0.50}
`

// webGuest is what a hub keeps of a microVM of the host.
const webGuest = `{"format": 1, "guests": [{"uid": "01", "namespace": "default", "name": "web", "host": "host-0", "cards": [{"mac": "02:00:00:00:00:0c"}]}]}`

// shown is what clients ask for, and what they hear.
const shown = "-O mtu -O ntpsrv -O staticroutes -O tftp -O bootfile -O 224"

// TestDHCPAsConfigured has real clients hear what the configuration says: on the segment,
// behind a relay, by each kind of reservation; and no lease is lost when it changes.
func TestDHCPAsConfigured(t *testing.T) {
	need.Binary(t, "dhcrelay")
	need.Binary(t, "dhcpcd")
	need.Binary(t, "dhcpd")
	segment(t)
	dir, config := configured(t, twoMachines, nil)
	hub := operator(t, dir)
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	base := string(text)
	write(t, config, base+allOfDHCP)
	write(t, mkdir(t, filepath.Dir(guestsFile))+"/"+filepath.Base(guestsFile), webGuest)
	// A relay in the guest's place, and a client beyond it.
	sh(t, `set -e; ip netns add far; ip link add inner netns guest type veth peer name eth0 netns far
		ip -n guest addr add 192.168.10.5/25 dev eth0; ip -n guest addr add 10.7.0.1/24 dev inner; ip -n guest link set inner up
		ip -n far link set eth0 address 02:00:00:00:00:0d up; ip route add 10.7.0.0/24 via 192.168.10.5
		ip netns exec guest sysctl -qw net.ipv4.ip_forward=1`)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", "far").CombinedOutput(); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	relay := exec.Command("ip", "netns", "exec", "guest", "dhcrelay", "-4", "-d", "-a", "-iu", "eth0", "-id", "inner", "192.168.10.2")
	if err := relay.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { relay.Process.Kill(); relay.Wait() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	leases := func() string {
		t.Helper()
		r, err := hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		var all strings.Builder
		for _, l := range r.GetLeases() {
			fmt.Fprintf(&all, "%s %s %s %v %s\n", l.GetIp(), l.GetMac(), l.GetState(), l.GetReserved(), l.GetMicrovm())
		}
		return all.String()
	}
	show := write(t, dir+"/show", "#!/bin/sh\nenv | grep -E '^(ip|lease|router|dns|domain|mtu|ntpsrv|staticroutes|tftp|bootfile|boot_file|opt224)='\n")
	ask := func(ns, mac, more string, want ...string) {
		t.Helper()
		sh(t, fmt.Sprintf("ip -n %s link set eth0 down && ip -n %[1]s link set eth0 address %s up", ns, mac))
		if ns == "guest" {
			sh(t, "ip -n guest addr replace 192.168.10.5/25 dev eth0")
		}
		got := sh(t, "ip netns exec "+ns+" busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 "+shown+" "+more+" -s "+show+" 2>&1")
		for _, want := range want {
			if !strings.Contains(got, "\n"+want+"\n") {
				t.Errorf("%s in %s: no %q in\n%s", mac, ns, want, got)
			}
		}
	}
	kill := start(t, config)
	if got, want := leases(), "10.7.0.50 02:00:00:00:00:0b reserved true \n192.168.10.100 02:00:00:00:00:0a reserved true \n"+
		"192.168.10.101  reserved true \n192.168.10.102  reserved true default/web\n"; got != want {
		t.Errorf("at first\n%s", got)
	}
	sh(t, "dhcpd -t -4 -cf "+dhcpConfigFile+" 2>&1") // all of it can be said to dhcpd
	near := []string{"lease=1200", "router=192.168.10.2", "dns=9.9.9.9", "domain=example.org", "mtu=1400", "ntpsrv=192.168.10.4",
		"staticroutes=10.8.0.0/14 192.168.10.5 0.0.0.0/0 192.168.10.2", "tftp=tftp.example.org", "opt224=07ff"}
	ask("guest", "02:00:00:00:00:01", "", append(near, "ip=192.168.10.10")...)
	ask("guest", "02:00:00:00:00:02", "", "ip=192.168.10.11")
	ask("guest", "02:00:00:00:00:03", "", "ip=192.168.10.28") // after what is excluded
	ask("guest", "02:00:00:00:00:0a", "", append(near, "ip=192.168.10.100")...)
	ask("guest", "02:00:00:00:00:04", "-C -x 61:010203", append(near, "ip=192.168.10.101")...)
	ask("guest", "02:00:00:00:00:0c", "", append(near, "ip=192.168.10.102")...)
	far := []string{"lease=1800", "router=10.7.0.1", "dns=192.168.10.2", "domain=example.org", "ntpsrv=192.168.10.4"}
	ask("far", "02:00:00:00:00:0d", "", append(far, "ip=10.7.0.10")...)
	ask("far", "02:00:00:00:00:0b", "", append(far, "ip=10.7.0.50")...)
	// Beyond the relay the hub is asked for names, too.
	sh(t, "ip -n far addr add 10.7.0.50/24 dev eth0 && ip -n far route add default via 10.7.0.1")
	if got := sh(t, "ip netns exec far busybox nslookup -type=a host-0.lab.internal 192.168.10.2"); !strings.Contains(got, "Address: 192.168.10.3\n") {
		t.Errorf("names beyond the relay:\n%s", got)
	}
	before := leases()
	if n := strings.Count(before, " active "); n != 8 {
		t.Errorf("%d leases:\n%s", n, before)
	}

	// It changes: who has an address keeps it, and hears what is new.
	kill()
	changed := strings.NewReplacer("mtu: 1400", "mtu: 1450", "default: 20m", "default: 10m", "tftp.example.org", "other.example.org",
		"10.7.0.10, last", "10.7.0.9, last", "- {mac: \"02:00:00:00:00:0b\", address: 10.7.0.50}\n", "").Replace(allOfDHCP)
	write(t, config, base+changed)
	start(t, config)
	if after := leases(); after != strings.Replace(before, "02:00:00:00:00:0b active true", "02:00:00:00:00:0b active false", 1) {
		t.Errorf("leases were\n%sand are\n%s", before, after)
	}
	ask("guest", "02:00:00:00:00:01", "", "ip=192.168.10.10", "mtu=1450", "lease=600", "tftp=other.example.org")
	ask("guest", "02:00:00:00:00:0c", "", "ip=192.168.10.102", "mtu=1450")
	ask("far", "02:00:00:00:00:0d", "", "ip=10.7.0.10")

	// A client that sets what it hears has the routes.
	conf := write(t, dir+"/dhcpcd.conf", "noarp\nnoipv6\noption classless_static_routes, routers, interface_mtu, domain_name\n")
	dhcpcd := exec.Command("ip", "netns", "exec", "guest", "dhcpcd", "-4", "-B", "-f", conf, "-c", "/bin/true", "eth0")
	if err := dhcpcd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { // asked, since only it knows what it has started elsewhere
		dhcpcd.Process.Signal(syscall.SIGTERM)
		insist := time.AfterFunc(10*time.Second, func() { dhcpcd.Process.Kill() })
		defer insist.Stop()
		dhcpcd.Wait()
	}()
	tests.Await(t, 10*time.Second, "the routes", func() bool {
		routes := sh(t, "ip -n guest route show")
		return strings.Contains(routes, "10.8.0.0/14 via 192.168.10.5 ") && strings.Contains(routes, "default via 192.168.10.2 ")
	})
}
