package env

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ingot/api/types"
	"ingot/internal/hub"
)

// resolved parses a text and decides what it leaves open.
func resolve(t *testing.T, text string, was *Env) Env {
	t.Helper()
	d := parse(t, text)
	e, err := d.resolve("lab", was, nobodyElse)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func show(e Env) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s guests %s", e.Subnet, e.Uplink, ranges(e.DHCP.Ranges))
	for _, m := range e.Machines {
		fmt.Fprintf(&b, "; %s %s %v", m.Name, m.Address, m.roles())
	}
	return b.String()
}

func TestNumbering(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"nothing said", "", "192.168.10.0/25 100.64.0.0/30 guests 192.168.10.26 - 192.168.10.126; network-hub 192.168.10.2 [hub]; host-0 192.168.10.3 [host]; host-1 192.168.10.4 [host]"},
		{"a large subnet", "subnet: 10.0.0.0/8", "10.0.0.0/8 100.64.0.0/30 guests 10.0.0.26 - 10.1.0.25; network-hub 10.0.0.2 [hub]; host-0 10.0.0.3 [host]; host-1 10.0.0.4 [host]"},
		{"/16", "subnet: 172.20.0.0/16", "172.20.0.0/16 100.64.0.0/30 guests 172.20.0.26 - 172.20.255.254; network-hub 172.20.0.2 [hub]; host-0 172.20.0.3 [host]; host-1 172.20.0.4 [host]"},
		{"/26, the smallest with the page's places", "subnet: 10.1.0.64/26", "10.1.0.64/26 100.64.0.0/30 guests 10.1.0.90 - 10.1.0.126; network-hub 10.1.0.66 [hub]; host-0 10.1.0.67 [host]; host-1 10.1.0.68 [host]"},
		{"/29, the smallest", "subnet: 10.1.0.8/29", "10.1.0.8/29 100.64.0.0/30 guests 10.1.0.13 - 10.1.0.14; network-hub 10.1.0.10 [hub]; host-0 10.1.0.11 [host]; host-1 10.1.0.12 [host]"},
		{"both roles", "subnet: 10.1.0.8/29\nmachines: [{name: one, roles: [hub, host]}]", "10.1.0.8/29 100.64.0.0/30 guests 10.1.0.11 - 10.1.0.14; one 10.1.0.10 [hub host]"},
		{"the hub is listed last", "machines: [{name: a, roles: [host]}, {name: h, roles: [hub]}]", "192.168.10.0/25 100.64.0.0/30 guests 192.168.10.26 - 192.168.10.126; a 192.168.10.3 [host]; h 192.168.10.2 [hub]"},
		{"addresses that are said are taken", "subnet: 10.1.0.0/24\nmachines: [{name: a, roles: [host]}, {name: b, address: 10.1.0.3, roles: [host]}, {name: h, address: 10.1.0.4, roles: [hub]}]", "10.1.0.0/24 100.64.0.0/30 guests 10.1.0.26 - 10.1.0.254; a 10.1.0.5 [host]; b 10.1.0.3 [host]; h 10.1.0.4 [hub]"},
		{"a range at the bottom", "subnet: 10.1.0.0/24\ndhcp: {first: 10.1.0.1, last: 10.1.0.99}", "10.1.0.0/24 100.64.0.0/30 guests 10.1.0.1 - 10.1.0.99; network-hub 10.1.0.100 [hub]; host-0 10.1.0.101 [host]; host-1 10.1.0.102 [host]"},
	} {
		e := resolve(t, "format: 2\n"+c.text, nil)
		if got := show(e); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
		roundTrip(t, e)
	}
	many := "format: 2\nmachines:\n- {name: hub, roles: [hub]}\n"
	for i := range 30 {
		many += fmt.Sprintf("- {name: h%d, roles: [host]}\n", i)
	}
	_, err := Parse("f", []byte(many))
	if want := "f:26: machines[23]: no address of 192.168.10.0/25 is left for it"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestWhatWasDecidedStays changes the file of an environment that is there.
func TestWhatWasDecidedStays(t *testing.T) {
	const three = "format: 2\nmachines:\n- {name: hub, roles: [hub]}\n- {name: a, roles: [host]}\n- {name: b, roles: [host]}\n"
	was := resolve(t, three, nil)
	was.Subnet, was.Uplink = netip.MustParsePrefix("192.168.12.0/25"), netip.MustParsePrefix("100.64.0.8/30") // the usual ones were taken
	for i := range was.Machines {
		was.Machines[i].Address = at(was.Subnet, uint32(i+2))
	}
	was.DHCP.Ranges = []hub.Range{{First: addr("192.168.12.26"), Last: addr("192.168.12.126")}}
	for _, c := range []struct {
		name, text string
		want       []string // what changes
		all        string
	}{
		{"nothing", three, nil, ""},
		{"a host more, listed first", "format: 2\nmachines:\n- {name: c, roles: [host]}\n" + strings.SplitAfterN(three, "machines:\n", 2)[1],
			[]string{"+ machine c: 192.168.12.5, [host]"},
			"192.168.12.0/25 100.64.0.8/30 guests 192.168.12.26 - 192.168.12.126; c 192.168.12.5 [host]; hub 192.168.12.2 [hub]; a 192.168.12.3 [host]; b 192.168.12.4 [host]"},
		{"a host less", strings.Replace(three, "- {name: a, roles: [host]}\n", "", 1),
			[]string{"- machine a, with all that is on it"},
			"192.168.12.0/25 100.64.0.8/30 guests 192.168.12.26 - 192.168.12.126; hub 192.168.12.2 [hub]; b 192.168.12.4 [host]"},
		{"another for one", strings.Replace(three, "name: a", "name: d", 1),
			[]string{"+ machine d: 192.168.12.3, [host]", "- machine a, with all that is on it"}, ""},
		{"another range", "subnet: 192.168.12.0/25\ndhcp: {first: 192.168.12.40, last: 192.168.12.50}\n" + three,
			[]string{"~ DHCP range 192.168.12.40 - 192.168.12.50, was 192.168.12.26 - 192.168.12.126: a microVM with an address outside gets another one when it renews it"}, ""},
	} {
		e := resolve(t, c.text, &was)
		if diff := cmp.Diff(c.want, changes(&was, e)); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
		if c.all != "" && show(e) != c.all {
			t.Errorf("%s:\n got %s\nwant %s", c.name, show(e), c.all)
		}
		roundTrip(t, e)
	}

	// And what can't be changed.
	for _, c := range []struct{ text, want string }{
		{"format: 2\nsubnet: 10.0.0.0/24\nuplink: 100.64.9.0/30\n" + strings.SplitAfterN(three, "\n", 2)[1],
			"f:2: subnet: it is 192.168.12.0/25, and can't be changed while the environment is there: `ingot down` first\n" +
				"f:3: uplink: it is 100.64.0.8/30, and can't be changed while the environment is there: `ingot down` first"},
		{"format: 2\nsubnet: 192.168.12.0/25\nmachines:\n- {name: hub, roles: [hub, host]}\n- {name: a, address: 192.168.12.9, roles: [host]}\n",
			"f:4: machines[0].roles: they are [hub], and can't be changed: give the machine another name, which makes it another machine\n" +
				"f:5: machines[1].address: it is 192.168.12.3, and can't be changed: give the machine another name, which makes it another machine"},
		{"format: 2\nmachines:\n- {name: other, roles: [hub, host]}\n", "f:2: machines: the hub is hub: another machine can't become it"},
		{"format: 2\nsubnet: 192.168.12.0/25\ndhcp: {first: 192.168.12.3, last: 192.168.12.9}\nmachines:\n- {name: hub, address: 192.168.12.2, roles: [hub]}\n- {name: a, address: 192.168.12.3, roles: [host]}\n", ""},
	} {
		d, err := Parse("f", []byte(c.text))
		if err == nil {
			_, err = d.resolve("lab", &was, nobodyElse)
		}
		if c.want == "" {
			if err == nil {
				t.Error("a machine's address is in the range of guests")
			}
			continue
		}
		if err == nil || err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

func TestANewEnvironment(t *testing.T) {
	e := resolve(t, "format: 2\nmachines: [{name: one, roles: [hub, host]}]", nil)
	want := []string{
		"+ environment lab: subnet 192.168.10.0/25, uplink 100.64.0.0/30, DHCP range 192.168.10.26 - 192.168.10.126",
		"+ machine one: 192.168.10.2, [hub host]",
	}
	if diff := cmp.Diff(want, changes(nil, e)); diff != "" {
		t.Error(diff)
	}
}

// TestTheUplinkAvoidsTheSubnet resolves files that say one of the two.
func TestTheUplinkAvoidsTheSubnet(t *testing.T) {
	for _, text := range []string{"format: 2\nsubnet: 100.64.0.0/16\n", "format: 2\nuplink: 192.168.10.4/30\n"} {
		d := parse(t, text)
		var asked []netip.Prefix
		_, err := d.resolve("lab", nil, func(want netip.Prefix, avoid ...netip.Prefix) (netip.Prefix, error) {
			asked = avoid
			return want, nil
		})
		if err != nil || !asked[0].IsValid() {
			t.Errorf("%s: %v, avoided %v", text, err, asked)
		}
	}
}

func TestPlanMicroVMs(t *testing.T) {
	wanted := parse(t, `
format: 2
microvms:
- {name: same, image: busybox}
- {name: pinned, image: busybox, host: host-0}
- {name: moved, image: busybox, host: host-1}
- {name: other, image: busybox, memory: 512}
- {name: new, image: busybox, host: host-1}
- {name: theirs, image: busybox}
- {name: same, namespace: team, image: busybox}
`).MicroVMs
	was := parse(t, `
format: 2
microvms:
- {name: same, image: busybox}
- {name: pinned, image: busybox}
- {name: moved, image: busybox, host: host-0}
- {name: other, image: busybox, memory: 256}
- {name: dropped, namespace: team, image: busybox}
`).MicroVMs
	var have []placed
	for _, m := range was {
		spec, err := m.wanted()
		if err != nil {
			t.Fatal(err)
		}
		have = append(have, placed{"host-0", &types.MicroVM{Spec: spec}})
	}
	for _, name := range []string{"theirs", "by-hand"} {
		have = append(have, placed{"host-1", &types.MicroVM{Spec: &types.MicroVMSpec{Namespace: "default", Id: name, Labels: map[string]string{"a": "b"}}}})
	}
	plan := planMicroVMs(wanted, have)
	want := []string{
		"- microVM team/dropped on host-0, which the file no longer declares",
		"~ microVM default/moved: it is on host-0; made anew on host-1, with an empty disk",
		"~ microVM default/other: it is declared otherwise than it was made; made anew on the host with most room, with an empty disk",
		"+ microVM default/new on host-1",
		"+ microVM team/same on the host with most room",
	}
	if diff := cmp.Diff(want, plan.lines()); diff != "" {
		t.Error(diff)
	}
	for force, want := range map[bool]int{false: 3, true: 1} { // force does not take what is another's
		if got := plan.objections(force); len(got) != want {
			t.Errorf("force %v: %d objections: %v", force, len(got), got)
		}
	}
	if empty := planMicroVMs(nil, nil); empty.lines() != nil || empty.objections(false) != nil {
		t.Errorf("%+v", empty)
	}
}

// TestPrint changes a declaration in each way that makes it another microVM, and in
// those that don't.
func TestPrint(t *testing.T) {
	base := MicroVM{Name: "a", Image: "busybox"}
	seen := map[string]string{base.print(): "itself"}
	for name, m := range map[string]MicroVM{
		"name": {Name: "b", Image: "busybox"}, "image": {Name: "a", Image: "debian"}, "cpus": {Name: "a", Image: "busybox", CPUs: 2},
		"memory": {Name: "a", Image: "busybox", Memory: 512}, "env": {Name: "a", Image: "busybox", Env: map[string]string{"A": "b"}},
		"labels": {Name: "a", Image: "busybox", Labels: map[string]string{"A": "b"}}, "namespace": {Name: "a", Namespace: "x", Image: "busybox"},
		"spec": {Name: "a", Spec: map[string]any{"vcpu": 1}},
	} {
		if other := seen[m.print()]; other != "" {
			t.Errorf("%s is the same as %s", name, other)
		}
		seen[m.print()] = name
	}
	for name, m := range map[string]MicroVM{
		"host": {Name: "a", Image: "busybox", Host: "host-1"}, "namespace": {Name: "a", Namespace: "default", Image: "busybox"},
	} {
		if m.print() != base.print() {
			t.Errorf("%s makes it another", name)
		}
	}
}

func TestFormat1IsRead(t *testing.T) {
	b, err := os.ReadFile("testdata/format1.yaml")
	if err != nil {
		t.Fatal(err)
	}
	e, err := readKept("f", b)
	const want = "192.168.11.0/25 100.64.0.4/30 guests 192.168.11.26 - 192.168.11.126; network-hub 192.168.11.2 [hub]; host-0 192.168.11.3 [host]; host-1 192.168.11.4 [host]"
	if err != nil || show(e) != want {
		t.Errorf("%v: %s", err, show(e))
	}
	roundTrip(t, e)
	var all Objections
	if _, err := Parse("f", b); !errors.As(err, &all) || !strings.Contains(err.Error(), "f:1: format: 1 is not known to this version") {
		t.Errorf("as a user's file: %v", err)
	}
}

// TestRecordedMicroVMs: of a host that does not run, the files say what `up` would
// take from it, before anything is changed.
func TestRecordedMicroVMs(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"default/a/01J": `{"format":1,"spec":{"uid":"01J","namespace":"default","name":"a","labels":{"ingot/declared":"0"}}}`,
		"default/b/01K": `{"format":1,"spec":{"uid":"01K","namespace":"default","name":"b"}}`,
		"default/c/01L": `{"format":1,"spec":{"uid":"01L","namespace":"default","name":"c"},"deleting":true}`,
		"default/d/01M": `half`,
	} {
		vm := dir + "/machines/host-0/var/lib/flintlock/vm/" + name
		if err := os.MkdirAll(vm, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vm+"/vm.json", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wanted := parse(t, "format: 2\nmicrovms:\n- {name: a, image: busybox}\n- {name: b, image: busybox}\n").MicroVMs
	plan := planMicroVMs(wanted, recorded(dir+"/machines/host-0", "host-0"))
	if o := plan.objections(false); len(o) != 2 || len(plan.create) != 0 || len(plan.remove) != 0 {
		t.Errorf("objections %v, %+v", o, plan)
	}
}

func TestLostMicroVMs(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"default/a/01J", "team/b/01K", "team/half/01L"} {
		vm := dir + "/var/lib/flintlock/vm/" + name
		if err := os.MkdirAll(vm, 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(name, "half") {
			continue // it was never recorded
		}
		if err := os.WriteFile(vm+"/vm.json", nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"default/a", "team/b"}, vmsOnDisk(dir)); diff != "" {
		t.Error(diff)
	}
}
