package inspect

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	v1 "ingot/api/ingot/v1"
)

// present is how long ago a peer's last handshake may be: one that is there makes
// another every two minutes (REKEY-AFTER-TIME of WireGuard, and a try).
const present = 3 * time.Minute

func vpnStep(v *v1.VPNFacts, interfaces []*v1.InterfaceFacts) step {
	return step{
		name:  "VPN",
		check: func(context.Context) finding { return checkVPN(v) },
		children: []step{
			{name: "interface", check: func(context.Context) finding {
				p, err := netip.ParsePrefix(v.GetAddress())
				if err != nil {
					return fail(fmt.Sprintf("%q is no address with a subnet", v.GetAddress()))
				}
				return checkAddress(interfaces, v.GetInterface(), p.Addr())
			}},
			{name: "peers", check: func(context.Context) finding { return checkPeers(v.GetPeers()) }},
		},
	}
}

func checkVPN(v *v1.VPNFacts) finding {
	if !v.GetServing() {
		return fail("nobody comes in: " + cmp.Or(v.GetError(), "it is not running"))
	}
	if v.GetEndpoint() == "" {
		return warn("it is not known where the hub is reached from outside: `vpn: {endpoint: HOST}` in the environment's file says it")
	}
	return pass(fmt.Sprintf("UDP port %d, reached at %s", v.GetPort(), v.GetEndpoint()), "WireGuard: "+v.GetImplementation(), "public key: "+v.GetPublicKey())
}

// checkPeers is never a failure: a device may be asleep.
func checkPeers(peers []*v1.VPNPeer) finding {
	var notes, absent, odd []string
	for _, p := range peers {
		last := "never"
		if p.Handshake != nil {
			last = age(time.Since(p.GetHandshake().AsTime())) + " ago"
		}
		notes = append(notes, fmt.Sprintf("%s %s %s, handshake %s", p.GetName(), p.GetAddress(), cmp.Or(p.GetEndpoint(), "-"), last))
		switch {
		case p.GetOutside():
			odd = append(odd, fmt.Sprintf("%s has %s, of a subnet that the VPN had before: `ingot vpn remove %s`, and add it again", p.GetName(), p.GetAddress(), p.GetName()))
		case p.Handshake == nil || time.Since(p.GetHandshake().AsTime()) > present:
			absent = append(absent, fmt.Sprintf("%s (%s)", p.GetName(), last))
		}
	}
	if len(absent) > 0 {
		odd = append(odd, "not connected: "+strings.Join(absent, ", "))
	}
	found := pass(count(len(peers), "peer", "peers"), notes...)
	if len(odd) > 0 {
		found.status, found.detail = Warn, strings.Join(odd, "; ")
	}
	return found
}
