package inspect

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "ingot/api/ingot/v1"
)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-d)) }

// withVPN is a hub with one peer, which is there.
func withVPN(w *world) *v1.VPNFacts {
	v := &v1.VPNFacts{
		Serving: true, Implementation: "kernel", Interface: "vpn0", Address: "10.91.0.1/24", Port: 51820, Endpoint: "203.0.113.1:51820",
		Peers: []*v1.VPNPeer{{Name: "laptop", Address: "10.91.0.2", Endpoint: "203.0.113.9:4000", Handshake: ago(20 * time.Second)}},
	}
	w.hub.facts.Vpn = v
	w.hub.facts.Interfaces = append(w.hub.facts.Interfaces, &v1.InterfaceFacts{Name: "vpn0", Up: true, Addresses: []string{"10.91.0.1/24"}})
	return v
}

func TestVPN(t *testing.T) {
	const peers = "warn: network-hub > VPN > peers: "
	for _, c := range []struct {
		name string
		ruin func(w *world, v *v1.VPNFacts)
		ok   bool
		want []string
	}{
		{"all is well", func(*world, *v1.VPNFacts) {}, true, nil},
		{"nobody was let in", func(_ *world, v *v1.VPNFacts) { v.Peers = nil }, true, nil},
		{"the port is in use", func(_ *world, v *v1.VPNFacts) {
			v.Serving, v.Error = false, "listen udp4 :51820: address already in use"
		}, false,
			[]string{"fail: network-hub > VPN: nobody comes in: listen udp4 :51820: address already in use"}},
		{"the interface is gone", func(w *world, _ *v1.VPNFacts) {
			w.hub.facts.Interfaces = w.hub.facts.Interfaces[:len(w.hub.facts.Interfaces)-1]
		}, false,
			[]string{"fail: network-hub > VPN > interface: there is no interface vpn0"}},
		{"the interface is down", func(w *world, _ *v1.VPNFacts) { w.hub.facts.Interfaces[len(w.hub.facts.Interfaces)-1].Up = false }, false,
			[]string{"fail: network-hub > VPN > interface: vpn0 is down"}},
		{"nobody knows where it is", func(_ *world, v *v1.VPNFacts) { v.Endpoint = "" }, true,
			[]string{"warn: network-hub > VPN: it is not known where the hub is reached from outside: `vpn: {endpoint: HOST}` in the environment's file says it"}},
		{"a peer sleeps, and one never came", func(_ *world, v *v1.VPNFacts) {
			v.Peers[0].Handshake = ago(2 * time.Hour)
			v.Peers = append(v.Peers, &v1.VPNPeer{Name: "phone", Address: "10.91.0.3"})
		}, true, []string{peers + "not connected: laptop (2h0m ago), phone (never)"}},
		{"a peer of another subnet", func(_ *world, v *v1.VPNFacts) { v.Peers[0].Address, v.Peers[0].Outside = "10.5.0.2", true }, true,
			[]string{peers + "laptop has 10.5.0.2, of a subnet that the VPN had before: `ingot vpn remove laptop`, and add it again"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := green(t, 1)
			c.ruin(w, withVPN(w))
			r := Run(t.Context(), w.env)
			if diff := cmp.Diff(c.want, r.Findings()); diff != "" || r.OK != c.ok {
				t.Errorf("OK %v, %s", r.OK, diff)
			}
			if find(r, "network-hub", "VPN") == nil {
				t.Error("there is no check of the VPN")
			}
		})
	}
	if r := Run(t.Context(), green(t, 1).env); find(r, "network-hub", "VPN") != nil {
		t.Error("a hub without a VPN has a check of it")
	}
}
