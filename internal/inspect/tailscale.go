package inspect

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	v1 "ingot/api/ingot/v1"
)

// renewal is how long before a login ends that is told.
const renewal = 14 * 24 * time.Hour

// refused begins the hub's words for a login that was refused.
const refused = "log in: the server says: "

func tailscaleStep(t *v1.TailscaleFacts) step {
	return step{
		name:  "Tailscale",
		check: func(context.Context) finding { return checkTailscale(t) },
		children: []step{
			{name: "login", check: func(context.Context) finding { return checkLogin(t) }},
			{name: "route advertised", check: func(context.Context) finding {
				if !t.GetAdvertised() {
					return fail(t.GetRoute() + " is not offered to the tailnet: somebody has changed tailscaled, and the hub sets it again")
				}
				return pass(t.GetRoute())
			}},
			{name: "route approved", check: func(context.Context) finding {
				if !t.GetApproved() {
					return warn(fmt.Sprintf("%s is not approved, so that no peer uses it: approve it where %s has its machines, at the subnet routes of %s; autoApprovers in the tailnet's policy do that for good",
						t.GetRoute(), t.GetLoginServer(), t.GetName()))
				}
				return pass(t.GetRoute())
			}},
		},
	}
}

func checkTailscale(t *v1.TailscaleFacts) finding {
	if !t.GetServing() {
		found := fail("nobody comes in: " + cmp.Or(t.GetError(), "it is not running"))
		if strings.HasPrefix(t.GetError(), refused) {
			found.detail += "; put a new auth key into the file that auth_key_file names, and `ingot up -f` the environment's"
			found.lasting = true
		}
		return found
	}
	how := "device: tailscale0"
	if t.GetUserspace() {
		how = "no device: tailscaled passes connections on by itself, since there is no /dev/net/tun"
	}
	return pass(fmt.Sprintf("%s, %s", t.GetState(), count(int(t.GetPeers()), "peer", "peers")), "tailscaled: "+t.GetVersion(), "socket: "+t.GetSocket(), how)
}

func checkLogin(t *v1.TailscaleFacts) finding {
	found := pass(fmt.Sprintf("%s %s", strings.TrimSuffix(t.GetName(), "."), strings.Join(t.GetAddresses(), " ")), "server: "+t.GetLoginServer())
	if t.Expires == nil {
		return found
	}
	left := time.Until(t.GetExpires().AsTime())
	if left > renewal && !t.GetExpired() {
		found.notes = append(found.notes, "ends in "+age(left))
		return found
	}
	return warn(fmt.Sprintf("it ends in %s, and the hub then logs in anew by its auth key: have a valid one in the file that auth_key_file names, and `ingot up -f` the environment's; or have the tailnet not let it end", age(max(left, 0))))
}
