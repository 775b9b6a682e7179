package hub

import (
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/firewalld"
	"ingot/internal/firewalld/firewalldtest"
	"ingot/internal/need"
	"ingot/internal/tests"
)

// beyond puts a world behind the hub's uplink, to which there is no way back but by
// the hub's address, and has neither of the hub's interfaces forward.
func beyond(t *testing.T) {
	t.Helper()
	need.Binary(t, "nft")
	need.Binary(t, "ping")
	sh(t, `set -e; ip netns add world; ip link set world netns world; ip addr add 203.0.113.1/24 dev uplink
		ip -n world addr add 203.0.113.2/24 dev world; ip -n world link set world up
		echo 0 >/proc/sys/net/ipv4/conf/segment/forwarding; echo 0 >/proc/sys/net/ipv4/conf/uplink/forwarding`)
	t.Cleanup(func() { afterwards(t, "ip -n world link set world netns $$; ip netns del world") })
}

func afterwards(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", line, err, out)
	}
}

// join has the guest ask for an address.
func join(t *testing.T) {
	t.Helper()
	set := write(t, t.TempDir()+"/set", "#!/bin/sh\n[ -z $ip ] || { ip addr replace $ip/25 dev eth0; ip route replace default via $router; }\n")
	sh(t, "ip netns exec guest busybox udhcpc -i eth0 -n -q -f -t 10 -T 1 -s "+set+" 2>&1")
}

func passes() bool {
	return exec.Command("ip", "netns", "exec", "guest", "ping", "-c", "1", "-W", "1", "203.0.113.2").Run() == nil
}

// lacks is what the hub says that its rules lack.
func lacks(t *testing.T, hub ingotv1.HubClient) []string {
	t.Helper()
	f, err := hub.Facts(t.Context(), &emptypb.Empty{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return f.GetNat().GetMissing()
}

func clear(t *testing.T, config string) error {
	t.Helper()
	c, err := ReadConfig(config, "test")
	if err != nil {
		t.Fatal(err)
	}
	return Clear(t.Context(), c)
}

// cleared says whether there is the ruleset that there was, and no forwarding.
func cleared(t *testing.T, ruleset string) {
	t.Helper()
	if diff := cmp.Diff(ruleset, sh(t, "nft list ruleset")); diff != "" {
		t.Errorf("rules that are left: %s", diff)
	}
	if got := sh(t, "cat /proc/sys/net/ipv4/conf/segment/forwarding /proc/sys/net/ipv4/conf/uplink/forwarding"); got != "0\n0\n" {
		t.Errorf("forwarding is left: %s", got)
	}
	for _, file := range []string{forwardingFile, toldFile} {
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s is left", file)
		}
	}
}

// TestBesideFirewalld is a guest's life on a hub's machine that has a firewalld.
func TestBesideFirewalld(t *testing.T) {
	config, hub := alone(t)
	beyond(t)
	d := firewalldtest.New(t)
	d.Start()
	files, ruleset := d.Files(), sh(t, "nft list ruleset")
	const rules = "ipv4 filter FORWARD 0 -i segment -o uplink -j ACCEPT\nipv4 nat POSTROUTING 0 -o uplink -j MASQUERADE\n"

	kill := start(t, config)
	if missing := lacks(t, hub); len(missing) > 0 {
		tests.Await(t, 20*time.Second, "the hub to have told firewalld", func() bool { return len(lacks(t, hub)) == 0 })
	}
	join(t) // firewalld lets DHCP in, too
	if !passes() {
		t.Error("a guest's packets don't pass")
	}
	if got := d.Cmd("--direct", "--get-all-rules"); got != rules {
		t.Errorf("direct rules: %s", got)
	}
	d.Cmd("--reload")
	tests.Await(t, 20*time.Second, "packets to pass after a reload", func() bool { return passes() && d.Cmd("--direct", "--get-all-rules") == rules })
	// What somebody takes away is named, and told again by the next hub.
	d.Cmd("--zone=trusted", "--remove-interface=segment")
	d.Cmd(append([]string{"--direct", "--remove-rule"}, strings.Fields(strings.Split(rules, "\n")[1])...)...)
	if diff := cmp.Diff([]string{
		"direct rule ipv4 nat POSTROUTING 0 -o uplink -j MASQUERADE (firewall-cmd --direct --add-rule ipv4 nat POSTROUTING 0 -o uplink -j MASQUERADE)",
		"passage through firewalld's inet firewalld filter_FORWARD (reject in filter_FWD_public)",
	}, lacks(t, hub)); diff != "" {
		t.Errorf("missing: %s", diff)
	}
	if err := clear(t, config); err == nil || !strings.Contains(err.Error(), "a hub runs here") {
		t.Errorf("clear beside a hub: %v", err)
	}
	kill()
	kill = start(t, config)
	tests.Await(t, 20*time.Second, "packets to pass with the next hub", func() bool { return passes() && d.Cmd("--direct", "--get-all-rules") == rules })
	kill()
	if !passes() {
		t.Error("a hub that has ended takes its way with it")
	}

	for range 2 {
		if err := clear(t, config); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.Cmd("--direct", "--get-all-rules"); got != "" {
		t.Errorf("direct rules are left: %s", got)
	}
	if zones := d.Cmd("--list-all-zones"); strings.Contains(zones, "segment") {
		t.Errorf("the segment is left: %s", zones)
	}
	// iptables leaves empty tables of its own, and firewalld the chains of a zone that
	// had something in it.
	sh(t, "nft delete table ip filter; nft delete table ip nat")
	d.Cmd("--reload")
	cleared(t, ruleset)
	if diff := cmp.Diff(files, d.Files()); diff != "" {
		t.Errorf("firewalld's files: %s", diff)
	}
}

// serve has a hub of a configuration serve, until it is killed.
func serve(t *testing.T, config string, hub ingotv1.HubClient, text string) (kill func()) {
	t.Helper()
	write(t, config, text)
	kill = start(t, config)
	if _, err := hub.Facts(t.Context(), &emptypb.Empty{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	return kill
}

// TestFirewalldAfterChange: what a hub's configuration wants no more is taken back by the
// next hub. What others have given firewalld, be it the same, stays.
func TestFirewalldAfterChange(t *testing.T) {
	config, hub := alone(t)
	beyond(t)
	d := firewalldtest.New(t)
	d.Start()
	sh(t, "ip link add other type veth peer name farther")
	t.Cleanup(func() { afterwards(t, "ip link del other") })
	// Somebody's own: at run time, before there was a hub, and beside what it will want.
	for _, own := range [][]string{
		{"--zone=trusted", "--add-source=100.64.0.0/30"}, {"--zone=trusted", "--add-interface=mine0"}, {"--add-port=51821/udp"},
		{"--direct", "--add-rule", "ipv4", "filter", "FORWARD", "0", "-i", "mine0", "-j", "ACCEPT"},
	} {
		d.Cmd(own...)
	}
	has := func() string { return d.Cmd("--list-all-zones") + d.Cmd("--direct", "--get-all-rules") }
	files, before := d.Files(), has()
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	first := string(b)
	told := func(what string, c string) string {
		t.Helper()
		defer serve(t, config, hub, c)()
		parsed, err := ParseConfig([]byte(c))
		if err != nil {
			t.Fatal(err)
		}
		// It has given it all, and the next moment noted it has nothing else.
		tests.Await(t, 20*time.Second, what, func() bool {
			missing, err := firewalld.Missing(t.Context(), parsed.firewalld())
			var noted firewalld.Wants
			return err == nil && len(missing) == 0 && readJSON(toldFile, &noted) == nil && reflect.DeepEqual(noted.Without(parsed.firewalld()), firewalld.Wants{})
		})
		return has()
	}
	plain := told("a plain hub", first)
	told("a hub with more", first+"trusted: 100.64.0.0/30\nvpn: {subnet: 10.91.0.0/24, port: 51820}\n")
	d.Cmd("--zone=trusted", "--query-interface=vpn0")
	d.Cmd("--query-port=51820/udp")
	told("a hub with another port", first+"trusted: 10.9.0.0/16\nvpn: {subnet: 10.91.0.0/24, port: 51821}\n")
	if zones := has(); strings.Contains(zones, "51820") || !strings.Contains(zones, "10.9.0.0/16") {
		t.Errorf("with another port and source: %s", zones)
	}
	told("a hub of another uplink", strings.Replace(first, "uplink: uplink", "uplink: other", 1))
	if rules := d.Cmd("--direct", "--get-all-rules"); strings.Contains(rules, "uplink") || !strings.Contains(rules, "-o other") {
		t.Errorf("with another uplink: %s", rules)
	}
	if diff := cmp.Diff(plain, told("the first again", first)); diff != "" {
		t.Errorf("the first again, firewalld has something else: %s", diff)
	}
	if err := clear(t, config); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, has()); diff != "" {
		t.Errorf("cleared, firewalld has something else: %s", diff)
	}
	if diff := cmp.Diff(files, d.Files()); diff != "" {
		t.Errorf("firewalld's files: %s", diff)
	}
}

// TestForwardingAfterChange: an interface that a hub has had forward, and does not want any
// more, forwards again what it did before; unless somebody else wants that since.
func TestForwardingAfterChange(t *testing.T) {
	config, hub := alone(t)
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	plain := string(b)
	const proc = "/proc/sys/net/ipv4/conf/"
	was := strings.TrimSpace(sh(t, "cat "+proc+"all/forwarding"))
	t.Cleanup(func() {
		afterwards(t, "ip link del other; ip link del open; echo "+was+" >"+proc+"all/forwarding; rm -f "+forwardingFile)
	})
	sh(t, `set -e; for i in other open; do ip link add $i type veth peer name $i-end; done
		for i in all lo segment uplink world other other-end open-end; do echo 0 >`+proc+`$i/forwarding; done; echo 1 >`+proc+`open/forwarding`)
	after := func(what, text, want string) {
		t.Helper()
		defer serve(t, config, hub, text)()
		if got := strings.Join(strings.Fields(sh(t, "cd "+proc+"; cat segment/forwarding uplink/forwarding other/forwarding open/forwarding")), " "); got != want {
			t.Errorf("%s: segment, uplink, other and open forward %s, want %s", what, got, want)
		}
	}
	const tailscale = "tailscale: {hostname: lab-hub}\n" // all of them, whether there is a tailscaled or not
	elsewhere := strings.Replace(plain, "uplink: uplink", "uplink: other", 1)
	after("with Tailscale", plain+tailscale, "1 1 1 1")
	after("without", plain, "1 1 0 1")
	after("with another uplink", elsewhere, "1 0 1 1")
	after("with Tailscale again", plain+tailscale, "1 1 1 1")
	sh(t, "echo 1 >/proc/sys/net/ipv4/ip_forward") // as Docker does when it starts
	after("without, but all are to forward", plain, "1 1 1 1")
	if err := clear(t, config); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, "cat "+proc+"segment/forwarding"); got != "1\n" {
		t.Errorf("cleared, the segment forwards %s, and all are to", got)
	}
}

// TestBesideOthers is the same with what Docker and ufw make.
func TestBesideOthers(t *testing.T) {
	for name, rules := range map[string]string{
		"Docker": `table ip filter {
			chain DOCKER-USER { return; }
			chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER
				iifname "docker0" oifname != "docker0" counter accept; }
}`,
		"ufw": `table ip filter {
			chain ufw-before-forward { ct state related,established accept; }
			chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw-before-forward; }
}`,
	} {
		t.Run(name, func(t *testing.T) {
			config, hub := alone(t)
			beyond(t)
			file := write(t, t.TempDir()+"/rules", rules+"\n")
			sh(t, "nft -f "+file)
			t.Cleanup(func() { afterwards(t, "nft flush ruleset") })
			ruleset := sh(t, "nft list ruleset")
			kill := start(t, config)
			if missing := lacks(t, hub); len(missing) > 0 {
				t.Errorf("missing: %q", missing)
			}
			join(t)
			if !passes() {
				t.Error("a guest's packets don't pass")
			}
			// It is made anew while the hub runs.
			sh(t, "nft delete table ip filter; nft -f "+file)
			if missing := lacks(t, hub); len(missing) != 1 || missing[0] != "passage through "+name+"'s ip filter FORWARD (policy drop)" {
				t.Errorf("missing: %q", missing)
			}
			kill()
			kill = start(t, config)
			lacks(t, hub)
			if !passes() {
				t.Error("a guest's packets don't pass with the next hub")
			}
			kill()
			if err := clear(t, config); err != nil {
				t.Fatal(err)
			}
			cleared(t, ruleset)
		})
	}
}
