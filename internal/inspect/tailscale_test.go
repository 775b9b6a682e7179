package inspect

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	v1 "ingot/api/ingot/v1"
)

func TestTailscale(t *testing.T) {
	const node = "network-hub > Tailscale"
	for _, c := range []struct {
		name string
		ruin func(f *v1.TailscaleFacts)
		ok   bool
		want []string
	}{
		{"all is well", func(*v1.TailscaleFacts) {}, true, nil},
		{"not approved", func(f *v1.TailscaleFacts) { f.Approved = false }, true, []string{"warn: " + node + " > route approved: 192.168.10.0/25 is not approved, so that no peer uses it: " +
			"approve it where https://controlplane.tailscale.com has its machines, at the subnet routes of network-hub.tail0000.ts.net.; autoApprovers in the tailnet's policy do that for good"}},
		{"not advertised", func(f *v1.TailscaleFacts) { f.Advertised = false }, false, []string{"fail: " + node + " > route advertised: 192.168.10.0/25 is not offered to the tailnet: somebody has changed tailscaled, and the hub sets it again"}},
		{"a wrong key", func(f *v1.TailscaleFacts) {
			f.Serving, f.Error = false, "log in: the server says: invalid key"
		}, false, []string{"fail: " + node + ": nobody comes in: log in: the server says: invalid key; put a new auth key into the file that auth_key_file names, and `ingot up -f` the environment's"}},
		{"not yet", func(f *v1.TailscaleFacts) { f.Serving, f.Error = false, "it has not reached the tailnet yet" }, false,
			[]string{"fail: " + node + ": nobody comes in: it has not reached the tailnet yet"}},
		{"no answer", func(f *v1.TailscaleFacts) { f.Serving, f.Error = false, "log in at http://x: timeout" }, false,
			[]string{"fail: " + node + ": nobody comes in: log in at http://x: timeout"}},
		{"the login ends", func(f *v1.TailscaleFacts) { f.Expires = ago(-50 * time.Hour) }, true, []string{"warn: " + node + " > login: it ends in 2d1h, and the hub then logs in anew by its auth key: " +
			"have a valid one in the file that auth_key_file names, and `ingot up -f` the environment's; or have the tailnet not let it end"}},
		{"the login ends much later", func(f *v1.TailscaleFacts) { f.Expires = ago(-1000 * time.Hour) }, true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := green(t, 1)
			f := &v1.TailscaleFacts{
				Serving: true, State: "Running", Name: "network-hub.tail0000.ts.net.", Addresses: []string{"100.101.102.103"},
				LoginServer: "https://controlplane.tailscale.com", Route: "192.168.10.0/25", Advertised: true, Approved: true,
			}
			c.ruin(f)
			w.hub.facts.Tailscale = f
			r := Run(t.Context(), w.env)
			if diff := cmp.Diff(c.want, r.Findings()); diff != "" || r.OK != c.ok {
				t.Errorf("OK %v, %s", r.OK, diff)
			}
			if stuck := c.name == "a wrong key"; r.Stuck() != stuck {
				t.Errorf("stuck: %v", r.Stuck())
			}
		})
	}
	if r := Run(t.Context(), green(t, 1).env); find(r, "network-hub", "Tailscale") != nil {
		t.Error("a hub in no tailnet has a check of it")
	}
}
