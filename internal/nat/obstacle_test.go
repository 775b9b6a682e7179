package nat_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/nat"
)

// Each ruleset is as its owner's program writes it, cut down to what forwards.
func TestObstacles(t *testing.T) {
	needs(t)
	for _, c := range []struct {
		name, rules string
		want        []string
	}{
		{"nothing", "", nil},
		{"Docker", `table ip filter {
			chain DOCKER-USER { return; }
			chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER
				oifname "docker0" ct state related,established counter accept
				iifname "docker0" oifname != "docker0" counter accept
				iifname "docker0" oifname "docker0" counter accept; }
}`,
			[]string{"Docker's ip filter FORWARD (policy drop)"}},
		{"ufw", `table ip filter {
			chain ufw-before-forward { ct state related,established accept; icmp type echo-request accept; }
			chain ufw-reject-forward { counter reject with icmp type port-unreachable; }
			chain FORWARD { type filter hook forward priority filter; policy accept; jump ufw-before-forward; jump ufw-reject-forward; }
}`,
			[]string{"ufw's ip filter FORWARD (reject in ufw-reject-forward)"}},
		{"firewalld", `table inet firewalld {
			chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
				ct state { established, related } accept; ct status dnat accept; iifname "lo" accept; ct state invalid drop
				reject with icmpx type admin-prohibited; }
}`,
			[]string{"firewalld's inet firewalld filter_FORWARD (reject in filter_FORWARD)"}},
		{"firewalld trusts the interface", `table inet firewalld {
			chain trusted { accept; }
			chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
				ct state { established, related } accept; iifname "ingot-lab" goto trusted
				reject with icmpx type admin-prohibited; }
}`, nil},
		{"answers", `table ip mine { chain f { type filter hook forward priority 0; oifname "ingot*" drop comment "nobody in"; }
}`,
			[]string{"ip mine f (drop in f: nobody in)"}},
		{"of others", `table ip mine { chain f { type filter hook forward priority 0; iifname "eth0" oifname "eth1" drop; tcp dport 25 drop; ip saddr 10.9.0.0/16 drop; iifname { "docker0", "br0" } drop; meta mark 7 drop; }
}`, nil},
		{"in a set", `table ip mine { chain f { type filter hook forward priority 0; iifname != { "docker0", "br0" } drop; }
}`,
			[]string{"ip mine f (drop in f)"}},
		{"ours", `table ip ingot-lab { chain forward { type filter hook forward priority 0; oifname "ingot-lab" drop; }
}`, nil},
		{"asking for a direction", `table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop
				ct direction reply accept; ct original ip saddr 10.9.0.1 accept; ct reply packets > 5 accept; ct packets > 7 accept; }
}`,
			[]string{"ip filter FORWARD (policy drop)"}},
		{"asking for what is not known here", `table ip mine { chain f { type filter hook forward priority 0; rt ipsec exists drop; iifname "ingot-lab" rt classid != 5 drop; }
}`, nil},
		{"IPv6", `table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }
}`, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			nft(t, "flush ruleset\n"+c.rules)
			before := listed(t)
			for _, want := range [][]string{c.want, nil} { // the second time they have been let pass
				found, err := nat.Obstacles("ingot-lab", "eth0")
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, o := range found {
					got = append(got, o.String())
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Error(diff)
				}
				if err := nat.LetPass("ingot-lab", found); err != nil {
					t.Fatal(err)
				}
			}
			if err := nat.RemovePassage("ingot-lab"); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, listed(t)); diff != "" {
				t.Errorf("RemovePassage left: %s", diff)
			}
		})
	}
	nft(t, "flush ruleset")
}

func nft(t *testing.T, rules string) {
	t.Helper()
	c := exec.Command("nft", "-f", "-")
	c.Stdin = strings.NewReader(rules)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

func listed(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	return string(out)
}
