package main

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/need"
)

func TestParseOptions(t *testing.T) {
	config := base64.StdEncoding.EncodeToString([]byte("version: 2\n"))
	p := base64.RawURLEncoding.EncodeToString([]byte(`{"args":["a","b c"],"env":{"K":"v"},"dir":"/d","user":"u"}`))
	o, err := parseOptions("console=ttyS0 root=/dev/vdb ro rw quiet ingot.hostname=h ingot.process=" + p +
		" network-config=" + config + " ingot.mount=/dev/vdb:/data:ro ingot.mount=bad ingot.poweroff=reboot x=y=z\n")
	if err != nil {
		t.Fatal(err)
	}
	if o.root != "/dev/vdb" || o.readOnly || o.hostname != "h" || o.powerOff != "reboot" || o.network != "version: 2\n" || o.nic != "eth1" {
		t.Errorf("options %+v", o)
	}
	if !slices.Equal(o.process.Args, []string{"a", "b c"}) || o.process.Env["K"] != "v" || o.process.Dir != "/d" || o.process.User != "u" {
		t.Errorf("process %+v", o.process)
	}
	if !slices.Equal(o.mounts, []mount{{"/dev/vdb", "/data", true}}) {
		t.Errorf("mounts %+v", o.mounts)
	}
	for _, bad := range []string{"ingot.process=%%%", "ingot.process=" + base64.RawURLEncoding.EncodeToString([]byte("{")), "network-config=%"} {
		if _, err := parseOptions(bad); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("root=/dev/vda rw ingot.process=e30 ingot.mount=a:/b:ro network-config=eA==")
	f.Fuzz(func(t *testing.T, line string) {
		o, err := parseOptions(line)
		if err == nil {
			parseNetwork(o.network)
		}
	})
}

func TestParseNetwork(t *testing.T) {
	nics := parseNetwork(`version: 2
ethernets:
  eth0:
    match:
      macaddress: "AA:FF:00:00:00:01"
    addresses:
    - 169.254.0.1/16
    - 10.1.0.1/8
    dhcp4: false
    nameservers:
      addresses:
      - 1.1.1.1
      - 9.9.9.9
  # a comment
  eth1:
    dhcp4: true
    gateway4: 10.0.0.1
    unknown:
      deep: x
bridges:
  br0:
    dhcp4: true
`)
	if len(nics) != 2 {
		t.Fatalf("%+v", nics)
	}
	a, b := nics[0], nics[1]
	if a.name != "eth0" || a.mac != "aa:ff:00:00:00:01" || a.dhcp || len(a.addresses) != 2 || len(a.nameservers) != 2 {
		t.Errorf("eth0 %+v", a)
	}
	if b.name != "eth1" || b.mac != "" || !b.dhcp || len(b.gateways) != 1 {
		t.Errorf("eth1 %+v", b)
	}
}

func FuzzParseNetwork(f *testing.F) {
	f.Add("ethernets:\n  a:\n    addresses:\n    - 1.2.3.4/5\n")
	f.Fuzz(func(t *testing.T, text string) { parseNetwork(text) })
}

// reply makes a server's answer to m.
func reply(m message, kind byte, options ...byte) []byte {
	b := make([]byte, bootpSize)
	b[0] = 2
	binary.BigEndian.PutUint32(b[4:], m.xid)
	copy(b[16:], []byte{10, 0, 0, 9})
	copy(b[28:], hardware(m.mac))
	b = binary.BigEndian.AppendUint32(b, cookie)
	b = append(b, optType, 1, kind)
	return append(append(b, options...), optEnd)
}

var sent = message{kind: discover, xid: 7, mac: "02:00:00:00:00:01", hostname: "h"}

func TestParseReply(t *testing.T) {
	b := reply(sent, ack, optNetmask, 4, 255, 255, 255, 128, 0, optRouter, 4, 10, 0, 0, 1, optDNS, 8, 1, 1, 1, 1, 9, 9, 9, 9,
		optDomain, 3, 'a', '.', 'b', optMTU, 2, 5, 120, optTime, 4, 0, 0, 0, 100, optServer, 4, 10, 0, 0, 2)
	l, kind, ok := parseReply(b, sent)
	if !ok || kind != ack {
		t.Fatalf("kind %d, %v", kind, ok)
	}
	if l.address != netip.MustParsePrefix("10.0.0.9/25") || l.router.String() != "10.0.0.1" || len(l.dns) != 2 || l.domain != "a.b" || l.mtu != 1400 || l.server.String() != "10.0.0.2" {
		t.Errorf("lease %+v", l)
	}
	if l.time != 100*time.Second || l.renew != 50*time.Second || l.rebind != 87500*time.Millisecond {
		t.Errorf("times %v %v %v", l.time, l.renew, l.rebind)
	}
	other := sent
	other.xid++
	if _, _, ok := parseReply(b, other); ok {
		t.Error("another exchange's answer was taken")
	}
	other = sent
	other.mac = "02:00:00:00:00:02"
	if _, _, ok := parseReply(b, other); ok {
		t.Error("another guest's answer was taken")
	}
	if _, kind, ok := parseReply(reply(sent, nak), sent); !ok || kind != nak {
		t.Error("a refusal was not taken")
	}
	if l, _, _ := parseReply(reply(sent, ack, optNetmask, 4, 255, 0, 0, 0, optDomain, 2, '\n', 'x'), sent); l.domain != "" {
		t.Errorf("domain %q would be a line of resolv.conf", l.domain)
	}
}

// Classless routes stand for the router (RFC 3442), come in parts, and are none if wrong.
func TestParseRoutes(t *testing.T) {
	mask, router := []byte{optNetmask, 4, 255, 255, 255, 0}, []byte{optRouter, 4, 10, 0, 0, 1}
	for _, c := range []struct {
		options []byte
		want    string
	}{
		{nil, "[0.0.0.0/0 10.0.0.1]"},
		{[]byte{optRoutes, 14, 14, 10, 11, 10, 0, 0, 5, 0, 10, 0, 0, 2, 0, 0, 0}, "[0.0.0.0/0 10.0.0.1]"}, // cut off
		{[]byte{optRoutes, 12, 14, 10, 11, 10, 0, 0, 5, 0, 10, 0, 0, 2}, "[10.8.0.0/14 10.0.0.5 0.0.0.0/0 10.0.0.2]"},
		{[]byte{optRoutes, 5, 14, 10, 8, 10, 0, optRoutes, 2, 0, 5}, "[10.8.0.0/14 10.0.0.5]"},
		{[]byte{optRoutes, 9, 32, 10, 9, 9, 9, 0, 0, 0, 0}, "[10.9.9.9/32 0.0.0.0]"},
		{[]byte{optRoutes, 9, 33, 10, 9, 9, 9, 0, 0, 0, 0}, "[0.0.0.0/0 10.0.0.1]"},
	} {
		l, _, ok := parseReply(reply(sent, ack, slices.Concat(mask, router, c.options)...), sent)
		got := []string{}
		for _, r := range l.routes {
			got = append(got, r.to.String()+" "+r.via.String())
		}
		if got := fmt.Sprint(got); !ok || got != c.want {
			t.Errorf("%v: %s, %v, want %s", c.options, got, ok, c.want)
		}
	}
}

// A lease's routes are the card's, and no longer than the lease says so.
func TestBoundSetsRoutes(t *testing.T) {
	need.Root(t)
	need.NetNS(t)
	runtime.LockOSThread() // and the thread ends with the test, and its namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	ip := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	ip("link", "add", "card", "type", "veth", "peer", "name", "other")
	ip("link", "set", "card", "up")
	ip("link", "set", "other", "up")
	n := &network{resolvers: map[string]resolver{}}
	way := func(to, via string) route { return route{netip.MustParsePrefix(to), netip.MustParseAddr(via)} }
	var before []route
	for _, c := range []struct {
		routes []route
		want   string
	}{
		{[]route{way("0.0.0.0/0", "10.0.0.1")}, "default via 10.0.0.1 10.0.0.0/24"},
		{[]route{way("0.0.0.0/0", "10.0.1.1"), way("10.0.1.0/24", "0.0.0.0"), way("10.8.0.0/14", "10.0.0.5")},
			"default via 10.0.1.1 10.0.0.0/24 10.0.1.0/24 10.8.0.0/14 via 10.0.0.5"},
		{[]route{way("0.0.0.0/0", "10.0.0.1"), way("10.8.0.0/14", "10.0.0.5")}, "default via 10.0.0.1 10.0.0.0/24 10.8.0.0/14 via 10.0.0.5"},
		{[]route{way("0.0.0.0/0", "10.0.0.1")}, "default via 10.0.0.1 10.0.0.0/24"},
		{nil, "10.0.0.0/24"},
	} {
		for range 2 { // a renewal changes nothing
			n.bound(iface{name: "card"}, lease{address: netip.MustParsePrefix("10.0.0.9/24"), routes: c.routes}, before)
			before = c.routes
			var got []string
			for line := range strings.Lines(ip("-4", "route", "show")) {
				way, _, _ := strings.Cut(line, " dev ")
				got = append(got, way)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%v: %q, want %q", c.routes, got, c.want)
			}
		}
	}
}

func FuzzParseReply(f *testing.F) {
	f.Add(reply(sent, offer, optNetmask, 4, 255, 255, 255, 0, optRoutes, 7, 14, 10, 8, 10, 0, 0, 5))
	f.Add(reply(sent, offer, optNetmask, 4, 255, 255, 255, 0))
	f.Add(reply(sent, ack, optTime, 4, 0, 0, 0, 1, optDNS))
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, kind, ok := parseReply(b, sent); ok && kind != nak {
			if !l.address.IsValid() || l.time > 0 && (l.renew <= 0 || l.renew > l.time || l.rebind < l.renew || l.rebind > l.time) {
				t.Errorf("lease %+v", l)
			}
		}
	})
}

func TestDatagram(t *testing.T) {
	payload := sent.marshal()
	if len(payload) < 300 || payload[0] != 1 {
		t.Fatalf("%d bytes", len(payload))
	}
	b := datagram(payload)
	if sum(0, b[:20]) != 0xffff {
		t.Error("the IP header's checksum is wrong")
	}
	pseudo := uint32(sum(0, b[12:20])) + 17 + uint32(len(b)-20)
	if sum(pseudo, b[20:]) != 0xffff {
		t.Error("the UDP checksum is wrong")
	}
	// Turned round, it is an answer.
	binary.BigEndian.PutUint16(b[22:], clientPort)
	got, ok := udpPayload(b)
	if !ok || string(got) != string(payload) {
		t.Error("the payload does not come out again")
	}
}

func FuzzUDPPayload(f *testing.F) {
	f.Add(datagram([]byte("x")))
	f.Fuzz(func(t *testing.T, b []byte) { udpPayload(b) })
}

func TestFindInit(t *testing.T) {
	for name, tc := range map[string]struct {
		files   map[string]string // "-> x" is a link
		want    string
		systemd bool
	}{
		"none":                {files: map[string]string{"/bin/sh": "x"}},
		"systemd by links":    {files: map[string]string{"/usr/lib/systemd/systemd": "x", "/lib": "-> usr/lib", "/sbin/init": "-> /lib/systemd/systemd"}, want: "/sbin/init", systemd: true},
		"systemd alone":       {files: map[string]string{"/lib/systemd/systemd": "x"}, want: "/lib/systemd/systemd", systemd: true},
		"another":             {files: map[string]string{"/sbin/init": "x"}, want: "/sbin/init"},
		"a loop":              {files: map[string]string{"/sbin/init": "-> init"}},
		"out of the root":     {files: map[string]string{"/sbin/init": "-> ../../../../../bin/x", "/bin/x": "x"}, want: "/sbin/init"},
		"busybox, no inittab": {files: map[string]string{"/bin/busybox": "x", "/sbin/init": "-> /bin/busybox"}},
		"busybox, openrc not there": {files: map[string]string{"/bin/busybox": "x", "/sbin/init": "-> /bin/busybox",
			"/etc/inittab": "# x\n::sysinit:/sbin/openrc sysinit\n"}},
		"busybox": {files: map[string]string{"/bin/busybox": "x", "/sbin/init": "-> /bin/busybox", "/sbin/openrc": "x",
			"/etc/inittab": "::sysinit:/sbin/openrc sysinit\n"}, want: "/sbin/init"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range tc.files {
				full := filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
					t.Fatal(err)
				}
				var err error
				if target, ok := strings.CutPrefix(text, "-> "); ok {
					err = os.Symlink(target, full)
				} else {
					err = os.WriteFile(full, []byte(text), 0o755)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			i, ok := findInit(root)
			if ok != (tc.want != "") || i.path != tc.want || i.systemd != tc.systemd {
				t.Errorf("found %+v, %v", i, ok)
			}
		})
	}
}

func TestKeepsNetwork(t *testing.T) {
	for files, want := range map[string]bool{
		"":                             false,
		"lib/systemd/systemd-networkd": false,
		"lib/systemd/systemd-networkd lib/systemd/systemd-udevd":                              false,
		"lib/systemd/systemd-networkd lib/systemd/systemd-udevd lib/systemd/systemd-resolved": true,
		"usr/lib/systemd/systemd-networkd usr/lib/systemd/systemd-udevd usr/bin/cloud-init":   true,
		"lib/systemd/systemd-networkd lib/systemd/systemd-resolved usr/bin/cloud-init":        false,
	} {
		root := t.TempDir()
		for _, f := range strings.Fields(files) {
			if err := os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, f), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if got := keepsNetwork(root, true); got != want {
			t.Errorf("%q: %v, want %v", files, got, want)
		}
		// Without data, cloud-init does nothing.
		if got := keepsNetwork(root, false); got != (want && !strings.Contains(files, "cloud-init")) {
			t.Errorf("%q, not seeded: %v", files, got)
		}
	}
}

func TestParseMounts(t *testing.T) {
	got := parseMounts(`21 1 253:0 / / rw,noatime shared:1 - ext4 /dev/root rw
22 21 0:5 / /dev rw - devtmpfs devtmpfs rw,mode=755
23 21 253:16 /sub /a\040place\134 rw - xfs /dev/vdb rw
too short - ext4
24 21 253:32 / /no-end rw
`)
	if !slices.Equal(got, []mountPoint{{"253:0", "/", "ext4"}, {"0:5", "/dev", "devtmpfs"}, {"253:16", `/a place\`, "xfs"}}) {
		t.Errorf("%+v", got)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("21 1 253:0 / / rw,noatime shared:1 - ext4 /dev/root rw\n")
	f.Fuzz(func(t *testing.T, table string) { parseMounts(table) })
}

func TestResized(t *testing.T) {
	for event, want := range map[string]string{
		"": "",
		"change@/devices/x/block/vda\x00ACTION=change\x00DEVNAME=vda\x00DEVTYPE=disk\x00RESIZE=1\x00SEQNUM=7\x00": "vda",
		"change@/devices/x/block/vda\x00RESIZE=1\x00DEVNAME=../../x\x00":                                          "x",
		"change@/devices/x/block/vda\x00ACTION=change\x00DEVNAME=vda\x00":                                         "",
		"change@/devices/x/block/vda\x00RESIZE=1":                                                                 "",
		"RESIZE=10\x00DEVNAME=vda": "",
	} {
		if got := resized([]byte(event)); got != want {
			t.Errorf("%q: %q, want %q", event, got, want)
		}
	}
}
