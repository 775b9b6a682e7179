package guest_test

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ingot/internal/agent"
	"ingot/internal/need"
)

const (
	segmentMAC  = "02:00:00:67:75:01"
	metadataMAC = "AA:FF:00:00:00:01"
)

// segment is a network namespace with two taps, a DHCP server on one, and the
// metadata service's address on the other.
type segment struct {
	name string
	log  *bufio.Reader // the server's
}

var segments atomic.Int32

func newSegment(t *testing.T) *segment {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "busybox")
	s := &segment{name: fmt.Sprintf("ingot-guest-%d-%d", os.Getpid(), segments.Add(1))}
	command(t, "ip", "netns", "add", s.name)
	t.Cleanup(func() { command(t, "ip", "netns", "delete", s.name) })
	for _, line := range []string{
		"link set lo up",
		"tuntap add seg0 mode tap", "tuntap add meta0 mode tap",
		"address add 10.67.0.1/24 dev seg0", "address add 169.254.169.254/32 peer 169.254.0.1 dev meta0",
		"link set seg0 up", "link set meta0 up",
	} {
		command(t, append([]string{"ip", "-n", s.name}, strings.Fields(line)...)...)
	}
	dir := t.TempDir()
	config := "start 10.67.0.50\nend 10.67.0.60\ninterface seg0\nlease_file " + dir + "/leases\npidfile " + dir + "/pid\n" +
		"option subnet 255.255.255.0\noption router 10.67.0.1\noption dns 10.67.0.1 9.9.9.9\noption domain example.test\noption lease 4\nmin_lease 4\n"
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "leases"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	server := exec.Command("ip", "netns", "exec", s.name, "busybox", "udhcpd", "-f", "-I", "10.67.0.1", dir+"/conf")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	server.Stderr, server.Stdout = w, w
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() { server.Process.Kill(); server.Wait(); r.Close() })
	s.log = bufio.NewReader(r)
	return s
}

func command(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// wait reads the server's log until it says what.
func (s *segment) wait(t *testing.T, what string) {
	t.Helper()
	for {
		line, err := s.log.ReadString('\n')
		if err != nil {
			t.Fatalf("the DHCP server's log: %v", err)
		}
		if strings.Contains(line, what) {
			return
		}
	}
}

// cards are QEMU's arguments for the segment's card and, behind it, the metadata's: the
// wrong order, which the guest is to put right.
func cards() []string {
	return []string{
		"-netdev", "tap,id=n1,ifname=seg0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n1,romfile=,mac=" + segmentMAC,
		"-netdev", "tap,id=n0,ifname=meta0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile=,mac=" + metadataMAC,
	}
}

func TestLease(t *testing.T) {
	t.Parallel()
	s := newSegment(t)
	vm := startIn(t, s.name, "", []string{"ingot.hostname=leased"}, cards()...)
	s.wait(t, "sending ACK to 10.67.0.")
	t.Logf("QEMU's start to lease: %v", time.Since(vm.started))
	vm.await(t, func(e agent.Event) bool {
		return len(e.Addresses) == 1 && strings.HasPrefix(e.Addresses[0].String(), "10.67.0.")
	})
	t.Logf("QEMU's start to the address's event: %v", time.Since(vm.started))
	_, out, _ := vm.run(t, sh("ip -4 -o a | awk '{print $2, $4}'; ip r | sort; cat /etc/resolv.conf"), nil)
	address := leasedAddress(t, vm)
	want := "lo 127.0.0.1/8\neth0 169.254.0.1/16\neth1 " + address + "/24\n" +
		"10.67.0.0/24 dev eth1 scope link  src " + address + " \n169.254.0.0/16 dev eth0 scope link  src 169.254.0.1 \ndefault via 10.67.0.1 dev eth1 \n" +
		"search example.test\nnameserver 10.67.0.1\nnameserver 9.9.9.9\n"
	if sorted(out) != sorted(want) {
		t.Errorf("the guest has\n%s\nwant\n%s", out, want)
	}
	for _, to := range []string{"10.67.0.1", "169.254.169.254"} {
		if code, out, _ := vm.run(t, sh("ping -c 1 -W 3 "+to), nil); code != 0 {
			t.Errorf("ping %s: %s", to, out)
		}
	}
	// The lease is for 4 s: half of it later it is renewed, by unicast.
	s.wait(t, "sending ACK to "+address)
	s.wait(t, "sending ACK to "+address)
	if now := leasedAddress(t, vm); now != address {
		t.Errorf("address %s, was %s", now, address)
	}
	// The image's own client gets the same one.
	if code, out, errOut := vm.run(t, agent.Command{Args: []string{"udhcpc", "-n", "-q", "-f", "-i", "eth1"}}, nil); code != 0 || !strings.Contains(out+errOut, address) {
		t.Errorf("udhcpc: code %d, %s%s", code, out, errOut)
	}
}

func leasedAddress(t *testing.T, vm *guestVM) string {
	t.Helper()
	info, err := vm.Info(vm.context(t))
	if err != nil || len(info.Addresses) != 1 {
		t.Fatalf("info %+v, %v", info, err)
	}
	return info.Addresses[0].String()
}

// sorted is a text's lines in order, with single spaces.
func sorted(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i := range lines {
		lines[i] = strings.Join(strings.Fields(lines[i]), " ")
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestStaticNetwork(t *testing.T) {
	t.Parallel()
	s := newSegment(t)
	config := `version: 2
ethernets:
  eth0:
    match:
      macaddress: ` + metadataMAC + `
    addresses:
    - 169.254.0.1/16
    dhcp4: false
  lan0:
    match:
      macaddress: ` + strings.ToUpper(segmentMAC) + `
    addresses:
    - 10.67.0.9/24
    - 10.67.0.10/24
    - fd67::9/64
    gateway4: 10.67.0.1
    gateway6: fd67::1
    dhcp4: false
    nameservers:
      addresses:
      - 1.1.1.1
`
	vm := startIn(t, s.name, "", []string{"network-config=" + base64.StdEncoding.EncodeToString([]byte(config))}, cards()...)
	vm.await(t, kind(agent.Ready))
	_, out, _ := vm.run(t, sh("ip -o a show dev lan0 | awk '{print $4}' | grep -v ^fe80; ip r | grep default; ip -6 r | grep default; cat /etc/resolv.conf"), nil)
	want := "10.67.0.9/24\n10.67.0.10/24\nfd67::9/64\ndefault via 10.67.0.1 dev lan0\ndefault via fd67::1 dev lan0 metric 1\nnameserver 1.1.1.1\n"
	if sorted(out) != sorted(want) {
		t.Errorf("the guest has\n%s\nwant\n%s", out, want)
	}
}
