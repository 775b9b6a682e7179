package hub

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/need"
	"ingot/internal/vpn"
)

// outside is a hub with a guest behind it, and a laptop outside.
type outside struct {
	dir             string
	config, without string // the hub's, with a VPN and without one
	hub             ingotv1.HubClient
}

func newOutside(t *testing.T) outside {
	t.Helper()
	for _, name := range []string{"wg-quick", "wireguard-go"} {
		need.Binary(t, name)
	}
	segment(t)
	sh(t, `set -e; ip netns add laptop; ip link set world name eth0 netns laptop; ip addr add 203.0.113.1/24 dev uplink
		ip -n laptop link set lo up; ip -n laptop addr add 203.0.113.2/24 dev eth0; ip -n laptop link set eth0 up
		ip -n guest addr add 192.168.10.30/25 dev eth0; ip -n guest route add default via 192.168.10.2`)
	t.Cleanup(func() {
		if out, err := exec.Command("sh", "-c", "ip -n laptop link del laptop; ip netns del laptop").CombinedOutput(); err != nil {
			t.Errorf("clean up: %v\n%s", err, out)
		}
	})
	dir, without := configured(t, only, nil)
	config := write(t, dir+"/vpn.yaml", fmt.Sprintf(usually, dir)+only+"vpn: {subnet: 10.91.0.0/24, port: 51820}\n")
	return outside{dir, config, without, operator(t, dir)}
}

// connect has the laptop use what the hub said, as its owner would.
func (o outside) connect(t *testing.T, key vpn.PrivateKey, r *ingotv1.AddVPNPeerResponse) {
	t.Helper()
	server, err := vpn.ParseKey(r.GetPublicKey())
	if err != nil {
		t.Fatal(err)
	}
	client := vpn.Client{Key: key, Address: netip.MustParseAddr(r.GetPeer().GetAddress()), Server: server, Endpoint: r.GetEndpoint()}
	for _, route := range r.GetAllowedIps() {
		client.Routes = append(client.Routes, netip.MustParsePrefix(route))
	}
	file := write(t, o.dir+"/laptop.conf", client.Config())
	sh(t, "ip netns exec laptop wg-quick up "+file+" </dev/null >/run/wg-quick.log 2>&1 || { cat /run/wg-quick.log; exit 1; }")
}

func fails(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err == nil {
		t.Errorf("%s succeeds:\n%s", line, out)
	}
}

func newKey(t *testing.T) vpn.PrivateKey {
	t.Helper()
	key, err := vpn.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestVPN is what an operator's device sees of a hub: its own, and what lies behind it.
func TestVPN(t *testing.T) {
	o := newOutside(t)
	hub := o.hub
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	facts := func() *ingotv1.VPNFacts {
		t.Helper()
		f, err := hub.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		return f.GetVpn()
	}
	kill := start(t, o.config)
	for !facts().GetServing() {
		if ctx.Err() != nil {
			t.Fatal(facts().GetError())
		}
	}
	key, other := newKey(t), newKey(t)
	r, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "laptop", PublicKey: key.Public().String()})
	if err != nil {
		t.Fatal(err)
	}
	if r.GetEndpoint() != "203.0.113.1:51820" || r.GetPeer().GetAddress() != "10.91.0.2" || strings.Join(r.GetAllowedIps(), " ") != "192.168.10.0/25 10.91.0.1/32" {
		t.Errorf("got %v", r)
	}
	again, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "laptop", PublicKey: key.Public().String()})
	if err != nil || again.GetPeer().GetAddress() != r.GetPeer().GetAddress() {
		t.Errorf("added again: %v, %v", again, err)
	}
	for _, c := range []struct {
		name, key string
		want      codes.Code
	}{
		{"laptop", other.Public().String(), codes.AlreadyExists}, {"phone", key.Public().String(), codes.AlreadyExists},
		{"phone", "", codes.InvalidArgument}, {"phone", key.Public().String()[1:], codes.InvalidArgument}, {"phone", r.GetPublicKey(), codes.InvalidArgument},
		{"", other.Public().String(), codes.InvalidArgument}, {"../x", other.Public().String(), codes.InvalidArgument},
	} {
		if _, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: c.name, PublicKey: c.key}); status.Code(err) != c.want {
			t.Errorf("add %q with key %q: %v, want %s", c.name, c.key, err, c.want)
		}
	}
	o.connect(t, key, r)
	reaches := func() {
		t.Helper()
		sh(t, `set -e; in="ip netns exec laptop busybox"; $in ping -c 1 -W 5 192.168.10.30; $in ping -c 1 -W 5 10.91.0.1
			for port in 9091 5000; do $in nc -w 5 192.168.10.2 $port -e true; done; $in nslookup -type=a network-hub.lab.internal 192.168.10.2`)
	}
	reaches()
	// A guest does not get at a peer, nor at the hub by its other addresses.
	fails(t, "ip netns exec guest busybox ping -c 1 -W 1 10.91.0.2")
	fails(t, "ip netns exec guest busybox nc -w 1 10.91.0.1 9091 -e true")
	if p := facts().GetPeers(); len(p) != 1 || p[0].GetHandshake() == nil || !strings.HasPrefix(p[0].GetEndpoint(), "203.0.113.2:") || p[0].GetReceivedBytes() == 0 {
		t.Errorf("peers: %v", p)
	}
	list, err := hub.ListVPNPeers(ctx, &ingotv1.ListVPNPeersRequest{})
	if err != nil || len(list.GetPeers()) != 1 || list.GetPeers()[0].GetName() != "laptop" {
		t.Errorf("list: %v, %v", list, err)
	}

	// A crash leaves the device in.
	kill()
	kill = start(t, o.config)
	for deadline := time.Now().Add(30 * time.Second); exec.Command("ip", "netns", "exec", "laptop", "busybox", "ping", "-c", "1", "-W", "1", "192.168.10.30").Run() != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the tunnel does not come back")
		}
	}
	reaches()

	// Removed, it is out at once.
	if _, err := hub.RemoveVPNPeer(ctx, &ingotv1.RemoveVPNPeerRequest{Name: "laptop"}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	fails(t, "ip netns exec laptop busybox ping -c 1 -W 1 192.168.10.30")
	if _, err := hub.RemoveVPNPeer(ctx, &ingotv1.RemoveVPNPeerRequest{Name: "laptop"}); status.Code(err) != codes.NotFound {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: "laptop", PublicKey: key.Public().String()}); err != nil {
		t.Fatal(err)
	}

	// Switched off, there is no interface, and who may come in is kept for another day.
	kill()
	kill = start(t, o.without)
	if facts() != nil {
		t.Errorf("without a VPN there is %v", facts())
	}
	fails(t, "ip link show vpn0")
	if _, err := hub.ListVPNPeers(ctx, &ingotv1.ListVPNPeersRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("list without a VPN: %v", err)
	}
	kill()
	start(t, o.config)
	if p := facts().GetPeers(); len(p) != 1 || p[0].GetPublicKey() != key.Public().String() {
		t.Errorf("switched on again, there is %v", p)
	}
}
