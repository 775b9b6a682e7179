package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// TestHubHears has a hub hear a real host, by TLS and with the token: its names are those
// of the microVMs that there are, whoever of the two was killed meanwhile.
func TestHubHears(t *testing.T) {
	need.Binary(t, "busybox")
	need.Binary(t, "nft")
	if !onMachine(t) {
		return
	}
	m := newMachineOn(t, func(string) {
		for _, dir := range []string{"/etc", "/var/lib"} {
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		}
		for _, dir := range hubDirs {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	})
	const host = "192.168.10.3"
	sh(t, `set -e; ip link add uplink type veth peer name world; ip link set uplink up; ip link set br0 up
		ip addr add `+hubAddress+`/25 dev br0; ip addr add `+host+`/25 dev br0`)
	ca, err := pki.OpenCA(m.dir+"/ca", "test")
	if err != nil {
		t.Fatal(err)
	}
	for name, ip := range map[string]string{"hub": hubAddress, "host": host} {
		if _, err := ca.Ensure(filepath.Join(m.dir, name), name, nil, []netip.Addr{netip.MustParseAddr(ip)}); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{
		"token": "secret\n",
		"config.yaml": fmt.Sprintf(`grpc-endpoint: %[2]s:9090
insecure-endpoint: 127.0.0.1:9090
tls-cert: %[1]s/host/cert.pem
tls-key: %[1]s/host/key.pem
tls-client-validate: true
tls-client-ca: %[1]s/host/ca.pem
token-file: %[1]s/token
bridge-name: br0
state-dir: %[1]s/state
pool: %[1]s/containerd
memory-overcommit: 0
vcpu-overcommit: 0
`, m.dir, host),
		"hub.yaml": fmt.Sprintf(`format: 1
interface: br0
uplink: uplink
address: %[2]s
subnet: 192.168.10.0/25
range-first: 192.168.10.26
range-last: 192.168.10.126
domain: lab.internal
machines: [{name: network-hub, address: %[2]s}, {name: host-0, address: %[3]s, host: true}]
pki: %[1]s/hub
token-file: %[1]s/token
registry: /var/lib/ingot/registry
`, m.dir, hubAddress, host),
	} {
		if err := os.WriteFile(filepath.Join(m.dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.killDaemon()
	m.conn.Close()
	if m.conn, err = wire.Dial(wire.Target{Address: "127.0.0.1:9090", Insecure: true, Token: "secret"}); err != nil {
		t.Fatal(err)
	}
	m.vms = v1alpha1.NewMicroVMClient(m.conn)
	startDaemon := func() {
		m.daemon = m.start(t, "daemon.log", "host", "--config", m.dir+"/config.yaml")
		m.list(t)
	}
	var hub *exec.Cmd
	startHub := func() { hub = m.start(t, "hub.log", "hub", "--config", m.dir+"/hub.yaml") }
	killHub := func() { hub.Process.Kill(); hub.Wait() }
	startDaemon()
	startHub()
	t.Cleanup(func() {
		killHub()
		if t.Failed() {
			t.Logf("the hub's log:\n%s", m.read(t, "hub.log"))
		}
	})

	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, hubAddress+":53")
	}}
	is := func(name string, want ...string) {
		t.Helper()
		await(t, name+" to be "+strings.Join(want, " "), func() bool {
			got, err := resolver.LookupHost(t.Context(), name+".test.lab.internal.")
			var problem *net.DNSError
			return slices.Equal(got, want) && (err == nil || errors.As(err, &problem) && problem.IsNotFound)
		})
	}
	// lease has a client with the microVM's card ask, and leave: the hollow guest has no network.
	lease := func(name string) {
		t.Helper()
		for _, v := range m.list(t) {
			if v.Spec.Id == name {
				card := v.Status.NetworkInterfaces["eth1"].GetGuestMac()
				sh(t, `set -e; ip netns add card; ip link add port type veth peer name eth0 address `+card+` netns card; ip link set port master br0 up
					ip -n card link set eth0 up; ip netns exec card busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -s /bin/true -x hostname:other 2>&1; ip netns del card`)
			}
		}
	}
	m.await(t, m.create(t, "one"), "running")
	is("one")
	lease("one")
	is("one", "192.168.10.26")
	uid := m.create(t, "two")
	m.await(t, uid, "running")
	lease("two")
	is("two", "192.168.10.27")

	m.killDaemon()
	is("one", "192.168.10.26")
	startDaemon()
	m.await(t, m.create(t, "three"), "running")
	lease("three")
	is("three", "192.168.10.28")
	m.remove(t, uid)
	is("two")

	killHub()
	for _, v := range m.list(t) {
		if v.Spec.Id == "three" {
			m.remove(t, v.Spec.GetUid())
		}
	}
	startHub()
	is("one", "192.168.10.26")
	is("three")
	for _, v := range m.list(t) {
		m.remove(t, v.Spec.GetUid())
	}
	is("one")

	// What it leaves in force is taken back when somebody says so.
	sh(t, "set -e; nft list table ip ingot; ! ingot hub clear --config "+m.dir+"/hub.yaml")
	killHub()
	sh(t, "set -e; nft list table ip ingot; ingot hub clear --config "+m.dir+"/hub.yaml; ! nft list table ip ingot")
}
