package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// tailnetEnv stands beside the environment of the scripts.
const tailnetEnv = e2eEnv + "-tailnet"

// withoutTailnet is an environment without microVMs, and inTailnet what has its hub be in a
// tailnet.
const (
	withoutTailnet = "format: 2\nsubnet: 10.78.0.0/25\nmachines: [{name: hub-0, roles: [hub]}, {name: host-0, roles: [host]}]\nmicrovms: []\n"
	inTailnet      = "tailscale: {auth_key_file: key, login_server: 'http://10.77.0.1:8080'}\n"
)

// operator works in a directory, by the shell.
type operator struct {
	*testing.T
	dir, path string
}

func (o operator) try(line string) (string, error) {
	c := exec.Command("sh", "-c", line)
	c.Dir = o.dir
	c.Env = append(os.Environ(), "PATH="+o.path+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", "INGOT_ENV="+tailnetEnv)
	out, err := c.CombinedOutput()
	return string(out), err
}

func (o operator) sh(line string) string {
	o.Helper()
	out, err := o.try(line)
	if err != nil {
		o.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// testTailscale is an operator's way with a tailnet: a key that is refused, a better one,
// a route that is approved, a peer outside, and the end of it. What a hub does in between
// is package hub's to test.
func testTailscale(t *testing.T, program string) {
	dir := t.TempDir()
	o := operator{t, dir, dir + ":" + filepath.Dir(program)}
	if out, err := exec.Command("../../internal/hub/testdata/tailnet/build", dir).CombinedOutput(); err != nil {
		t.Fatalf("build tailscaled: %v\n%s", err, out)
	}
	tidy := func() { _, _ = o.try("ingot down; ip netns del e2e-tailnet; ip link del e2e-tailnet") }
	tidy() // what a test that was killed has left
	t.Cleanup(tidy)
	say := o.tailnet()
	up := func(file, key string) (string, error) {
		t.Helper()
		if err := os.WriteFile(dir+"/env.yaml", []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		return o.try("umask 077; echo " + key + " >key; ingot up -f env.yaml")
	}

	if out, err := up(withoutTailnet+inTailnet, "tskey-bad"); err == nil || !strings.Contains(out, "log in: the server says: invalid authkey; put a new auth key into the file") || strings.Contains(out, "tskey") {
		t.Fatalf("with a wrong key: %v\n%s", err, out)
	}
	if out, err := up(withoutTailnet+inTailnet, "tskey-good"); err != nil || !strings.Contains(out, "green, with 1 warnings") || strings.Contains(out, "tskey") {
		t.Errorf("with a route that nobody has approved: %v\n%s", err, out)
	}
	if out := o.sh("ingot inspect"); !strings.Contains(out, "10.78.0.0/25 is not approved, so that no peer uses it") {
		t.Errorf("inspect:\n%s", out)
	}
	say("approve hub-0 10.78.0.0/25")
	if out := o.sh("ingot machine exec hub-0 -- tailscale status; ingot machine exec hub-0 -- tailscale ip -4"); strings.Count(out, "100.64.0.1") != 2 {
		t.Errorf("tailscale status:\n%s", out)
	}
	const kept = "/var/lib/ingot/" + tailnetEnv + "/machines/hub-0/etc/ingot/tailscale-key"
	if out := o.sh("stat -c %a " + kept + "; grep -rl tskey-good /var/lib/ingot/" + tailnetEnv); out != "600\n"+kept+"\n" {
		t.Errorf("the key is in\n%s", out)
	}
	o.sh(`set -e; peer="ip netns exec e2e-tailnet"
		$peer tailscaled --state=mem: --statedir=. --socket=p.sock --tun=tailscale0 --no-logs-no-support >p.log 2>&1 & trap "kill $!" EXIT
		for i in $(seq 100); do [ -S p.sock ] && break; sleep 0.05; done
		$peer tailscale --socket=p.sock up --timeout=20s --login-server=http://10.77.0.1:8080 --auth-key=file:key --accept-routes --accept-dns=false --netfilter-mode=off --hostname=peer
		for i in $(seq 20); do if $peer busybox nc -w 2 10.78.0.3 9090 -e true; then ok=1; break; fi; done
		test "$ok"; $peer busybox nslookup -type=a host-0.` + tailnetEnv + `.internal 10.78.0.2`)
	if out := o.sh("ingot inspect"); strings.Contains(out, "is not approved") {
		t.Errorf("with an approved route:\n%s", out)
	}

	// Without the section nothing of it stays.
	if out, err := up(withoutTailnet, "tskey-good"); err != nil || !strings.Contains(out, "- Tailscale: the hub leaves the tailnet") {
		t.Errorf("without the section: %v\n%s", err, out)
	}
	o.sh("for i in $(seq 100); do [ -e " + kept + " ] || exit 0; sleep 0.1; done; exit 1")
	if out, err := up(withoutTailnet+inTailnet, "tskey-good"); err != nil {
		t.Errorf("with the section again: %v\n%s", err, out)
	}
	if out := o.sh("ingot down"); strings.Contains(out, "note") {
		t.Errorf("down: %s", out)
	}
}

// tailnet starts a tailnet's server outside, and returns how to tell it something.
func (o operator) tailnet() (say func(string)) {
	o.Helper()
	o.sh(`set -e; ip netns add e2e-tailnet; ip link add e2e-tailnet type veth peer name eth0 netns e2e-tailnet
		ip addr add 10.77.0.254/24 dev e2e-tailnet; ip link set e2e-tailnet up; echo 1 >/proc/sys/net/ipv4/conf/e2e-tailnet/forwarding
		ip="ip -n e2e-tailnet"; $ip link set lo up; $ip addr add 10.77.0.1/24 dev eth0; $ip link set eth0 up`)
	server := exec.Command("ip", "netns", "exec", "e2e-tailnet", o.dir+"/tailnet", "-address=10.77.0.1", "-auth-key=tskey-good")
	in, err := server.StdinPipe()
	if err != nil {
		o.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		o.Fatal(err)
	}
	if err := server.Start(); err != nil {
		o.Fatal(err)
	}
	o.Cleanup(func() { in.Close(); server.Wait() })
	said := bufio.NewScanner(out)
	if !said.Scan() {
		o.Fatal("there is no tailnet")
	}
	return func(line string) {
		o.Helper()
		fmt.Fprintln(in, line)
		if !said.Scan() || said.Text() != "ok" {
			o.Fatalf("%s: %s", line, said.Text())
		}
	}
}
