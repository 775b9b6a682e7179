package hub

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/need"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// segment makes a hub's segment, with a guest's namespace on it, and its uplink, of which
// the other end is world.
func segment(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "busybox")
	sh(t, `set -e; ip link set lo up; ip netns add guest; ip link add uplink type veth peer name world; ip link set uplink up
		ip link add segment type veth peer name eth0 address `+mac(1).String()+` netns guest; ip addr add 192.168.10.2/25 dev segment; ip link set segment up
		ip -n guest link set lo up; ip -n guest link set eth0 up`)
	t.Cleanup(func() {
		for _, path := range []string{"/var/lib/ingot", leasesFile} {
			os.RemoveAll(path)
		}
		if out, err := exec.Command("sh", "-c", "for i in segment uplink; do ip link del $i 2>/dev/null; done; ip netns del guest; nft flush ruleset").CombinedOutput(); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
}

// usually is a hub's configuration, but for the machines and what a test is about.
const usually = `format: 1
interface: segment
uplink: uplink
address: 192.168.10.2
subnet: 192.168.10.0/25
range-first: 192.168.10.26
range-last: 192.168.10.126
domain: lab.internal
pki: %[1]s/hub
token-file: %[1]s/token
registry: %[1]s/registry
`

// configured is a new directory with a hub's configuration, more of which a test may say,
// and with what the hub, its operator and these machines show of themselves.
func configured(t *testing.T, more string, machines map[string]string) (dir, config string) {
	t.Helper()
	dir = t.TempDir()
	ca, err := pki.OpenCA(filepath.Join(dir, "ca"), "test")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{"hub": "192.168.10.2", "operator": "127.0.0.1"}
	maps.Copy(names, machines)
	for name, ip := range names {
		if _, err := ca.Ensure(filepath.Join(dir, name), name, nil, []netip.Addr{netip.MustParseAddr(ip)}); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir+"/token", "secret\n")
	return dir, write(t, dir+"/hub.yaml", fmt.Sprintf(usually, dir)+more)
}

// operator asks the hub.
func operator(t *testing.T, dir string) ingotv1.HubClient {
	t.Helper()
	conn, err := wire.Dial(wire.Target{Address: "192.168.10.2:9091", TLS: pki.In(dir + "/operator"), Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return ingotv1.NewHubClient(conn)
}

// only is the machine of a segment that has no other.
const only = "machines: [{name: network-hub, address: 192.168.10.2}]\n"

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
