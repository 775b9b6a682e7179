package env

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	hubyaml "github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ingot/docs"
	"ingot/internal/hub"
)

// comparable are what cmp needs to know of our values.
var comparable = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmpopts.IgnoreUnexported(Declaration{}), cmpopts.EquateEmpty(),
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func parse(t *testing.T, text string) Declaration {
	t.Helper()
	d, err := Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestReferenceFile(t *testing.T) {
	d, err := Parse("environment.yaml", docs.Environment)
	if err != nil {
		t.Fatal(err)
	}
	e, err := d.resolve("lab", nil, nobodyElse)
	if err != nil {
		t.Fatal(err)
	}
	got := Env{Name: e.Name, Subnet: e.Subnet, Uplink: e.Uplink, DHCP: e.DHCP, Machines: e.Machines}
	usual, err := (&Declaration{Machines: usualMachines()}).resolve("lab", nil, nobodyElse)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(usual, got, comparable); diff != "" {
		t.Errorf("the reference says something else than what is taken without a file (-usual +reference):\n%s", diff)
	}
	var names []string
	for _, m := range d.MicroVMs {
		names = append(names, m.String())
		spec, err := m.wanted()
		if err != nil || spec.GetLabels()[declared] == "" {
			t.Errorf("%s: %v %v", m, spec, err)
		}
	}
	if diff := cmp.Diff([]string{"default/web", "team/worker", "default/data"}, names); diff != "" {
		t.Error(diff)
	}
	if w := d.MicroVMs[1]; w.Memory != 256 || w.CPUs != 1 || w.Command[0] != "sh" || w.Env["GREETING"] != "hello" || w.Restart != "on-failure" || w.Host != "host-1" {
		t.Errorf("got %+v", w)
	}
}

// TestReferenceOfDHCP reads what the reference has of DHCP as comments, which is all that
// can be said.
func TestReferenceOfDHCP(t *testing.T) {
	text := string(docs.Environment)
	begin := strings.Index(text, "\ndhcp:\n")
	end := begin + strings.Index(text[begin:], "\n\n")
	section := strings.ReplaceAll(text[begin:end], "\n  # ", "\n  ")
	section = strings.Replace(section, "  first: 192.168.10.26\n  last: 192.168.10.126\n", "", 1) // ranges stand for them
	d := parse(t, text[:begin]+section+text[end:])
	e, err := d.resolve("lab", nil, nobodyElse)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, e)
	_, err = Parse("f", []byte("format: 2\ndhcp: {nonsense: 1}\n"))
	_, keys, _ := strings.Cut(err.Error(), ", only ")
	for key := range strings.SplitSeq(keys, ", ") {
		if !strings.Contains(text[begin:end], " "+key+":") {
			t.Errorf("the reference does not have %s", key)
		}
	}
}

// nobodyElse is a machine on which all subnets are free.
func nobodyElse(want netip.Prefix, avoid ...netip.Prefix) (netip.Prefix, error) {
	if slices.ContainsFunc(avoid, want.Overlaps) {
		return netip.Prefix{}, errors.New("overlaps")
	}
	return want, nil
}

func TestMistakes(t *testing.T) {
	const vms = "format: 2\nmicrovms:\n"
	for _, c := range []struct {
		name, text string
		want       []string // each with its line
	}{
		{"empty", "", []string{"1: it is empty: `ingot init` writes one to begin with"}},
		{"a comment", "# nothing\n", []string{"1: it is empty: `ingot init` writes one to begin with"}},
		{"not YAML", "format: 2\nname: [\n", []string{"2: it is not YAML: did not find expected node content"}},
		{"a list", "- a\n", []string{"1: it must be keys and values, and is a list"}},
		{"two documents", "format: 2\n---\nformat: 2\n", []string{"2: one document is enough: take away what begins here"}},
		{"no format", "name: lab\n", []string{"1: format is missing: begin with `format: 2`"}},
		{"format of another version", "\nformat: 3\n", []string{"2: format: 3 is not known to this version, which reads format 2"}},
		{"a key", "format: 2\nsubnets: 10.0.0.0/24\n", []string{`2: there is no key "subnets", only dhcp, dns, format, machines, microvms, name, subnet, tailscale, uplink, vpn`}},
		{"a key twice", "format: 2\nname: a\nname: b\n", []string{"3: name: it is there already in line 2"}},
		{"a key inside", "format: 2\nmachines:\n- name: a\n  adress: 10.0.0.1\n  roles: [hub, host]\n", []string{`4: machines[0]: there is no key "adress", only address, name, roles`}},
		{"a name", "format: 2\nname: My_Lab\n", []string{`2: name: "My_Lab" is not a name: only lower-case letters, digits and dashes, at most 32`}},
		{"subnets", "format: 2\nsubnet: 10.0.0.1/24\nuplink: fd00::/64\n", []string{
			"2: subnet: 10.0.0.1/24 is an address in a subnet: write 10.0.0.0/24",
			`3: uplink: "fd00::/64" is not an IPv4 subnet, such as 192.168.10.0/25`}},
		{"sizes", "format: 2\nsubnet: 10.0.0.0/30\nuplink: 10.1.0.0/31\n", []string{
			"2: subnet: 10.0.0.0/30 has no useful size: from /8 to /29",
			"3: uplink: 10.1.0.0/31 has no useful size: two addresses are needed, a /30"}},
		{"loopback", "format: 2\nsubnet: 127.0.0.0/24\n", []string{"2: subnet: 127.0.0.0/24 is not for machines"}},
		{"uplink in subnet", "format: 2\nsubnet: 10.0.0.0/16\nuplink: 10.0.9.0/30\n", []string{"3: uplink: 10.0.9.0/30 overlaps with subnet 10.0.0.0/16"}},
		{"a VPN", "format: 2\nsubnet: 10.0.0.0/24\nuplink: 10.1.0.0/30\nvpn:\n  subnet: 10.0.0.0/16\n  port: 0\n  endpoint: 'a b'\n  peers: []\n", []string{
			"5: vpn.subnet: 10.0.0.0/16 overlaps with subnet 10.0.0.0/24",
			"6: vpn.port: 0 is not a port: from 1 to 65535",
			`7: vpn.endpoint: "a b" is not where a hub can be reached: a name or an address, and :PORT if it is another one than the VPN's`,
			`8: vpn: there is no key "peers", only endpoint, port, subnet`}},
		{"a VPN on the uplink", "format: 2\nuplink: 10.1.0.0/30\nvpn: {subnet: 10.1.0.0/24, port: 70000}\n", []string{
			"3: vpn.port: 70000 is not a port: from 1 to 65535", "3: vpn.subnet: 10.1.0.0/24 overlaps with uplink 10.1.0.0/30"}},
		{"a VPN without room", "format: 2\nvpn: {subnet: 10.1.0.0/30}\n", []string{"2: vpn.subnet: 10.1.0.0/30 has no useful size: from /16 to /29"}},
		{"a VPN of multicast", "format: 2\nvpn: {subnet: 224.1.0.0/24}\n", []string{"2: vpn.subnet: 224.1.0.0/24 is not for machines"}},
		{"a VPN that is a text", "format: 2\nvpn: yes\n", []string{`2: vpn: it must be keys and values, and is "yes"`}},
		{"hub outside", "format: 2\nsubnet: 10.0.0.0/24\nmachines:\n- {name: h, address: 10.0.1.2, roles: [hub, host]}\n", []string{
			"4: machines[0].address: 10.0.1.2 is not in subnet 10.0.0.0/24"}},
		{"ends of the subnet", "format: 2\nsubnet: 10.0.0.0/24\nmachines:\n- {name: h, address: 10.0.0.0, roles: [hub]}\n- {name: i, address: 10.0.0.255, roles: [host]}\n", []string{
			"4: machines[0].address: 10.0.0.0 is the first or the last address of 10.0.0.0/24: nobody can have it",
			"5: machines[1].address: 10.0.0.255 is the first or the last address of 10.0.0.0/24: nobody can have it"}},
		{"an address without a subnet", "format: 2\nmachines:\n- {name: h, address: 10.0.0.2, roles: [hub, host]}\n", []string{"3: machines[0].address: an address needs a subnet: say which"}},
		{"ranges overlap", "format: 2\nsubnet: 10.0.0.0/24\ndhcp: {first: 10.0.0.2, last: 10.0.0.100}\nmachines:\n- {name: h, address: 10.0.0.2, roles: [hub, host]}\n", []string{
			"5: machines[0].address: 10.0.0.2 is in the DHCP range, 10.0.0.2 - 10.0.0.100: guests are given it"}},
		{"range backwards", "format: 2\nsubnet: 10.0.0.0/24\ndhcp:\n  first: 10.0.0.9\n  last: 10.0.0.8\n", []string{"3: dhcp: 10.0.0.9 is after 10.0.0.8"}},
		{"half a range", "format: 2\nsubnet: 10.0.0.0/24\ndhcp:\n  first: 10.0.0.9\n", []string{"3: dhcp: it needs both first and last"}},
		{"range outside", "format: 2\nsubnet: 10.0.0.0/24\ndhcp:\n  first: 10.0.0.9\n  last: 10.0.1.9\n", []string{"5: dhcp.last: 10.0.1.9 is not in subnet 10.0.0.0/24"}},
		{"a range that is too large", "format: 2\nsubnet: 10.0.0.0/8\ndhcp: {first: 10.1.0.0, last: 10.2.0.0}\n", []string{"3: dhcp: it has 65537 addresses, and 65536 are the most"}},
		{"names twice", "format: 2\nsubnet: 10.0.0.0/24\nmachines:\n- {name: a, address: 10.0.0.2, roles: [hub]}\n- {name: a, address: 10.0.0.2, roles: [host]}\n", []string{
			"5: machines[1].name: a is there already in line 4",
			"5: machines[1].address: 10.0.0.2 is there already in line 4"}},
		{"a machine's name", "format: 2\nmachines:\n- {name: ../x, roles: [hub]}\n- {roles: [host]}\n", []string{
			`3: machines[0].name: "../x" is not a machine's name: only lower-case letters, digits and dashes, none of them first or last, at most 63`,
			"4: machines[1]: it has no name"}},
		{"roles", "format: 2\nmachines:\n- {name: a, roles: [hub, router]}\n- {name: b}\n- {name: c, roles: []}\n- {name: d, roles: host}\n", []string{
			`3: machines[0].roles[1]: "router" is not a role: it must be hub or host`,
			"4: machines[1]: it has no roles: [hub], [host] or [hub, host]",
			"5: machines[2].roles: it has none: hub or host",
			`6: machines[3].roles: it must be a list, and is "host"`}},
		{"two hubs", "format: 2\nmachines:\n- {name: a, roles: [hub, host]}\n- {name: b, roles: [hub]}\n", []string{"2: machines: one machine must have the role hub, and 2 have it"}},
		{"no hub", "format: 2\nmachines:\n- {name: b, roles: [host]}\n", []string{"2: machines: one machine must have the role hub, and 0 have it"}},
		{"no host", "format: 2\nmachines:\n- {name: b, roles: [hub]}\n", []string{"2: machines: no machine has the role host"}},
		{"no machines", "format: 2\nmachines: []\n", []string{"2: machines: one machine must have the role hub, and 0 have it"}},
		{"a subnet that is too small", "format: 2\nsubnet: 10.0.0.0/29\nmachines:\n- {name: a, roles: [hub]}\n- {name: b, roles: [host]}\n- {name: c, roles: [host]}\n- {name: d, roles: [host]}\n- {name: e, roles: [host]}\n", []string{
			"2: subnet: no address of 10.0.0.0/29 after those of the machines is left for guests: it is too small, or `dhcp` must say which are theirs"}},
		{"microVMs", vms + "- {name: a, image: busybox, cpus: 0, memory: much, restart: maybe, host: nowhere, allowed_addresses: [10.0.0.300]}\n- {image: busybox}\n- {name: a, image: busybox}\n- {name: b}\n- {name: c/d, image: busybox}\n", []string{
			"3: microvms[0].cpus: 0: a microVM needs one",
			"3: microvms[0].memory: much: it must be a number of MiB, or one with M or G",
			"3: microvms[0].host: nowhere is not a host of this environment",
			`3: microvms[0].restart: "maybe": it must be always, on-failure or never`,
			`3: microvms[0].allowed_addresses: "10.0.0.300" is neither an address nor a prefix`,
			"4: microvms[1]: it has no name",
			"5: microvms[2].name: default/a is there already in line 3",
			"6: microvms[3]: it has no image",
			`7: microvms[4].name: "c/d" is not a name: letters, digits, '.', '_' and '-', 63 at most, a letter or digit first and last`}},
		{"ports", vms + "- {name: a, image: busybox, ports: [\"8080:80\", \"80\", \"8080:81/udp\"]}\n- {name: b, image: busybox, ports: [\"203.0.113.2:8080:80\"]}\n", []string{
			`3: microvms[0].ports[1]: port "80": "" is no port: it must be [ADDRESS:]PORT:TO[/tcp|/udp], like 8080:80`,
			"4: microvms[1].ports[0]: 203.0.113.2:8080 is published already in line 3"}},
		{"egress", vms + "- {name: a, image: busybox, egress: [deny private, deny everything]}\n- {name: b, image: busybox, egress: [allow all]}\n", []string{
			`3: microvms[0].egress: egress "deny everything": "everything" is no IPv4 prefix or address, nor private or all: it must be allow|deny PREFIX|private|all [tcp|udp|icmp|PORT[-PORT]/tcp|/udp]`,
			"4: microvms[1].egress: egress: no rule denies anything: what none matches is allowed, end with `deny all` if it is not to be"}},
		{"the VPN's port", "format: 2\nmachines: [{name: m, roles: [hub, host]}]\nvpn: {port: 5353}\nmicrovms:\n- {name: a, image: busybox, ports: [\"5353:53/udp\"]}\n", []string{"5: microvms[0].ports[0]: 5353 is the VPN's"}},
		{"the hub is no host", vms + "- {name: a, image: busybox, host: network-hub}\n", []string{"3: microvms[0].host: network-hub is not a host of this environment"}},
		{"limits", vms + "- {name: a, image: busybox, cpus: 99, memory: 1}\n- {name: b, image: 'a b'}\n", []string{
			"3: microvms[0].cpus: 99 is not between 1 and 64",
			"3: microvms[0].memory: 1 is not between 64 and 1048576",
			`4: microvms[1].image: "a b" is not an image's name: invalid reference format`}},
		{"a spec", vms + "- name: a\n  spec:\n    vcpus: 1\n- name: b\n  image: x\n  spec: {id: c}\n- name: c\n  spec: {vcpu: 1}\n", []string{
			`4: microvms[0].spec: unknown field "vcpus"`,
			"7: microvms[1].image: it can't stand beside spec, which has it in its own words",
			"8: microvms[1].spec: id, namespace and uid don't belong here: name and namespace stand beside it",
			"10: microvms[2].spec: kernel.image: is required",
			"10: microvms[2].spec: kernel.filename: is required",
			"10: microvms[2].spec: root_volume.source: is required"}},
		{"a disk beside a spec", vms + "- name: a\n  disk: 8G\n  spec: {kernel: {image: kernel, filename: boot/vmlinux}, vcpu: 1, memoryInMb: 128, rootVolume: {id: root, source: {containerSource: x}}}\n", []string{
			"4: microvms[0].disk: it can't stand beside spec, which has it in its own words"}},
		{"a secret of another file", "format: " + strings.Repeat("s", 31) + "\n", []string{
			`1: format: it must be a number, and is "` + strings.Repeat("s", 30) + `…"`}},
		{"an id in a spec", vms + "- name: a\n  spec: {id: c}\n", []string{"4: microvms[0].spec: id, namespace and uid don't belong here: name and namespace stand beside it"}},
		{"macvtap on the hub", "format: 2\nmachines: [{name: one, roles: [hub, host]}]\nmicrovms:\n- name: a\n  host: one\n  spec: {kernel: {image: kernel, filename: boot/vmlinux}, root_volume: {id: root, source: {container_source: busybox}}, interfaces: [{device_id: eth1, type: MACVTAP}]}\n", []string{
			"6: microvms[0].spec: interfaces[0]: one is the hub too, which a macvtap guest of its own can't reach: use TAP"}},
		{"our label", vms + "- name: a\n  image: busybox\n  labels:\n    ingot/declared: x\n", []string{"6: microvms[0].labels.ingot/declared: this label is `ingot up`'s own"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f", []byte(c.text))
			var got []string
			var all Objections
			if errors.As(err, &all) {
				for _, one := range all {
					got = append(got, strings.TrimPrefix(one.Error(), "f:"))
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v is not an invalid argument", err)
			}
		})
	}
}

// TestAllMistakesAtOnce has the mistakes that the issue names, and more, in one file.
func TestAllMistakesAtOnce(t *testing.T) {
	text, err := os.ReadFile("testdata/mistakes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Parse("mistakes.yaml", text)
	want, _ := os.ReadFile("testdata/mistakes.txt")
	if diff := cmp.Diff(string(want), err.Error()+"\n"); diff != "" {
		t.Error(diff)
	}
}

func TestLeftOut(t *testing.T) {
	for _, text := range []string{"format: 2", "format: 2\nmicrovms:\nmachines:\nname:\nsubnet: ~\n", "{format: 2}", "&a\nformat: 2"} {
		d := parse(t, text)
		if diff := cmp.Diff(Declaration{Machines: usualMachines()}, d, comparable); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
}

func TestAliases(t *testing.T) {
	d := parse(t, "format: 2\nmicrovms:\n- {name: a, image: &i busybox, env: &e {A: '1', B: yes}}\n- {name: b, image: *i, env: *e}\n")
	if b := d.MicroVMs[1]; b.Image != "busybox" || b.Env["A"] != "1" || b.Env["B"] != "yes" {
		t.Errorf("got %+v", b)
	}
}

func TestParseMemory(t *testing.T) {
	for s, want := range map[string]int32{
		"256": 256, "512M": 512, "512MiB": 512, "2G": 2048, "2GiB": 2048,
		"": 0, "0": 0, "-1": 0, "G": 0, "1.5G": 0, "2097152G": 0, "99999999999": 0, "1K": 0,
	} {
		got, err := ParseMemory(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
}

// FuzzParse holds the parser to what it promises: it says where each mistake is,
// and what it takes is kept and read again as the same.
func FuzzParse(f *testing.F) {
	f.Add(docs.Environment)
	for _, name := range []string{"testdata/mistakes.yaml", "testdata/dhcp.yaml", "testdata/format1.yaml"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("format: 2\nsubnet: 10.0.0.0/24\ndns: {upstreams: [9.9.9.9, 1.1.1.1:5353]}\nmicrovms: [{name: x, image: y, address: 10.0.0.9}]"))
	f.Add([]byte(everything))
	f.Add([]byte("format: 2\nvpn: {subnet: 10.1.0.0/24, port: 5, endpoint: '[fd00::1]:5'}"))
	f.Add([]byte("format: 2\nsubnet: 10.0.0.0/29\nmachines: [{name: a, roles: [hub, host]}]\nmicrovms: [{name: x, spec: {vcpu: 1}}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse("f", data)
		if err != nil {
			var all Objections
			if !errors.As(err, &all) {
				t.Fatalf("not objections: %v", err)
			}
			lines := 2 // for YAML there are more ways to end one
			for _, end := range []string{"\n", "\r", "\u0085", "\u2028", "\u2029"} {
				lines += strings.Count(string(data), end)
			}
			for _, one := range all {
				var m *Mistake
				if !errors.As(one, &m) || m.Line < 1 || m.Line > lines {
					t.Fatalf("in no line: %v", one)
				}
			}
			return
		}
		e, err := d.resolve("a", nil, nobodyElse)
		if err != nil {
			return // a declared subnet is in the way of the usual uplink
		}
		roundTrip(t, e)
	})
}

func roundTrip(t *testing.T, e Env) {
	t.Helper()
	b, err := e.marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := readKept("f", b)
	if err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	if lines := changes(&e, again); lines != nil {
		t.Fatalf("kept and read again, it is another: %s\n%s", lines, b)
	}
	if diff := cmp.Diff(e.Machines, again.Machines, comparable); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff(e.DHCP, again.DHCP, comparable); diff != "" {
		t.Fatalf("%s\n%s", diff, b)
	}
	// The hub serves with it.
	c := (&up{env: e}).hubConfig(t.Context(), e.Hub())
	text, err := hubyaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	read, err := hub.ParseConfig(text)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if diff := cmp.Diff([]any{c.DHCP, c.Reservations}, []any{read.DHCP, read.Reservations}, comparable); diff != "" {
		t.Fatalf("the hub reads something else: %s\n%s", diff, text)
	}
	for i := range e.MicroVMs {
		if e.MicroVMs[i].print() != again.MicroVMs[i].print() {
			t.Fatalf("microVM %s is another when it is read again:\n%s", e.MicroVMs[i], b)
		}
	}
}
