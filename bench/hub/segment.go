package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/pki"
)

// The segment has the hub on one side, and on the other all clients. Behind the
// uplink is the world.
const (
	hubAddr    = "10.0.0.1"
	clientAddr = "10.0.0.2"
	uplinkAddr = "192.0.2.1"
	worldAddr  = "192.0.2.2"
	rangeFirst = "10.0.1.0"
	rangeLast  = "10.15.255.250"
)

// hubDirs are where a hub has its files: of these, on the disk.
var hubDirs = []string{"/var/lib/dhcp", "/var/lib/ingot"}

// segment makes the network, and places for files that hide those of the machine.
func (b *bench) segment() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/etc", "/var/lib"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
	}
	for _, dir := range hubDirs {
		disk := filepath.Join(b.dir, filepath.Base(dir))
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(disk, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(disk, dir, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := b.files(); err != nil {
		return err
	}
	return sh(`set -e; ip link set lo up
		ip netns add clients; ip netns add world
		ip link add segment type veth peer name eth0 netns clients
		ip link add uplink type veth peer name eth0 netns world
		ip addr add ` + hubAddr + `/12 dev segment; ip addr add ` + uplinkAddr + `/24 dev uplink
		ip -n clients addr add ` + clientAddr + `/12 dev eth0; ip -n world addr add ` + worldAddr + `/24 dev eth0
		for n in clients world; do ip -n $n link set lo up; ip -n $n link set eth0 up; done
		ip link set segment up; ip link set uplink up
		ip -n clients route add default via ` + hubAddr + `
		until ip -o link show segment | grep -q "state UP"; do sleep 0.01; done`) // kea wants it so
}

// files are what the servers read, of the same addresses, leases and options.
func (b *bench) files() error {
	ca, err := pki.OpenCA(filepath.Join(b.dir, "ca"), "bench")
	if err != nil {
		return err
	}
	if _, err := ca.Ensure(filepath.Join(b.dir, "pki"), "hub", nil, []netip.Addr{netip.MustParseAddr(hubAddr)}); err != nil {
		return err
	}
	for file, text := range map[string]string{
		"/etc/passwd": "root:x:0:0::/:/bin/sh\n", "/etc/group": "root:x:0:\n",
		b.dir + "/token": "secret\n", b.dir + "/hub.yaml": hubConf, b.dir + "/kea": keaConf, b.dir + "/isc": iscConf,
	} {
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, "DIR", b.dir)), 0o600); err != nil {
			return err
		}
	}
	return nil
}

const (
	hubConf = `format: 1
interface: segment
uplink: uplink
address: ` + hubAddr + `
subnet: 10.0.0.0/12
range-first: ` + rangeFirst + `
range-last: ` + rangeLast + `
domain: lab.internal
dns-upstreams: ["` + worldAddr + `:53"]
machines: [{name: network-hub, address: ` + hubAddr + `}]
pki: DIR/pki
token-file: DIR/token
registry: /var/lib/ingot/registry
`
	keaConf = `{"Dhcp4": {"interfaces-config": {"interfaces": ["segment"], "dhcp-socket-type": "udp"},
		"lease-database": {"type": "memfile", "persist": true, "name": "DIR/dhcp/kea.csv", "lfc-interval": 0}, "valid-lifetime": 600,
		"subnet4": [{"subnet": "10.0.0.0/12", "pools": [{"pool": "` + rangeFirst + ` - ` + rangeLast + `"}],
			"option-data": [{"name": "routers", "data": "` + hubAddr + `"}, {"name": "domain-name-servers", "data": "` + hubAddr + `"}]}],
		"loggers": [{"name": "kea-dhcp4", "output_options": [{"output": "stdout"}], "severity": "ERROR"}]}}`
	// It makes a table of the whole range when it starts: a smaller one.
	iscConf = `default-lease-time 600; max-lease-time 7200; authoritative; ping-check false;
		subnet 10.0.0.0 netmask 255.240.0.0 { range ` + rangeFirst + ` 10.0.255.250; option routers ` + hubAddr + `; option domain-name-servers ` + hubAddr + `; }
		subnet 192.0.2.0 netmask 255.255.255.0 { }`
)

// server is one that runs.
type server struct {
	name string
	cmd  *exec.Cmd
	log  string // file
}

// start starts one of the servers. It writes where the hub does.
func (b *bench) start(name string) (*server, error) {
	line := map[string]string{
		"ingot":    "exec " + b.binary + " hub --config DIR/hub.yaml",
		"kea":      "mkdir -p /run/kea; exec kea-dhcp4 -c DIR/kea",
		"isc":      "touch DIR/dhcp/isc; exec dhcpd -4 -f -q -cf DIR/isc -lf DIR/dhcp/isc -pf /run/isc.pid segment",
		"dnsmasq":  "exec dnsmasq -k -u root -C /dev/null -R -h -x /run/dnsmasq.pid -z -a " + hubAddr + " -S " + worldAddr + " -c 10000",
		"upstream": "exec nsenter --net=/run/netns/world dnsmasq -k -u root -C /dev/null -R -h -x /run/upstream.pid --address=/bench.example/192.0.2.7 --local-ttl=3600",
		"answers":  "exec /proc/" + fmt.Sprint(os.Getpid()) + "/exe -answer",
		"iperf3":   "exec nsenter --net=/run/netns/world iperf3 -s",
	}[name]
	s := &server{name: name, log: filepath.Join("/run", name+".log")}
	log, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command("sh", "-c", strings.ReplaceAll(line, "DIR", b.dir))
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	return s, nil
}

// stop ends it, and what it keeps in the kernel.
func (s *server) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
	if s.name == "ingot" {
		exec.Command("nft", "flush", "ruleset").Run()
	}
}

// with has one of the servers run, which begins with no leases, once it answers.
func (b *bench) with(ctx context.Context, name string, answers func(context.Context) error, f func(*server) error) error {
	if err := b.empty(); err != nil {
		return err
	}
	s, err := b.start(name)
	if err != nil {
		return err
	}
	defer s.stop()
	if err := s.await(ctx, answers); err != nil {
		return err
	}
	return f(s)
}

// await waits until it answers.
func (s *server) await(ctx context.Context, answers func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		err := answers(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			log, _ := os.ReadFile(s.log)
			return fmt.Errorf("%s does not answer: %w\n%s", s.name, err, log)
		}
	}
}

// empty leaves no leases.
func (b *bench) empty() error {
	return sh("rm -rf /var/lib/dhcp/*; mkdir -p /etc/dhcp /etc/default")
}

func sh(script string) error {
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", script, err, out)
	}
	return nil
}

// client is a command in the clients' namespace.
func client(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/clients"}, args...)...)
}
