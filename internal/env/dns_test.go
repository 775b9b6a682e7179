package env

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ingot/internal/hub"
)

// TestResolversAndAddresses is what becomes of what files say of them, one after the other.
func TestResolversAndAddresses(t *testing.T) {
	const head, vm = "format: 2\nsubnet: 192.168.10.0/25\n", "microvms: [{name: web, image: busybox, address: 192.168.10.60}]\n"
	was := resolve(t, head, nil)
	var print string
	for _, c := range []struct {
		text      string
		upstreams []string // nil: this machine's
		kept      []hub.Reservation
		changes   []string
	}{
		{"dns: {upstreams: [9.9.9.9, 192.0.2.1:5353]}\n", []string{"9.9.9.9:53", "192.0.2.1:5353"}, nil, []string{"~ DNS asks 9.9.9.9:53 192.0.2.1:5353"}},
		{"dns: {upstreams: ['9.9.9.9:53', 192.0.2.1:5353]}\n", []string{"9.9.9.9:53", "192.0.2.1:5353"}, nil, nil},
		{"dns:\n" + vm, nil, []hub.Reservation{{MicroVM: "default/web", Address: netip.MustParseAddr("192.168.10.60")}},
			[]string{"~ DNS asks this machine's resolvers", "~ address 192.168.10.60 is kept for microVM default/web, which has it when it asks next"}},
		{"microvms: [{name: web, image: busybox}]\n", nil, nil, []string{"~ address 192.168.10.60 is not kept for microVM default/web any more"}},
	} {
		e := resolve(t, head+c.text, &was)
		if got, err := e.upstreams(); c.upstreams != nil && (err != nil || !cmp.Equal(got, c.upstreams)) {
			t.Errorf("%s: asks %v, %v", c.text, got, err)
		}
		if diff := cmp.Diff(c.kept, e.reservations(), comparable); diff != "" {
			t.Errorf("%s: %s", c.text, diff)
		}
		if diff := cmp.Diff(c.changes, changes(&was, e)); diff != "" {
			t.Errorf("%s: %s", c.text, diff)
		}
		roundTrip(t, e)
		for _, m := range e.MicroVMs { // it is not made anew for its address
			if print != "" && m.print() != print {
				t.Errorf("%s: the microVM is another", c.text)
			}
			print = m.print()
		}
		was = e
	}
	for text, want := range map[string]string{
		"dns: {upstreams: [127.0.0.53]}\n":                             "f:3: dns.upstreams[0]: 127.0.0.53 is the hub's own loopback: say where the resolver is reached from elsewhere",
		"dns: {upstreams: ['::1', x, 9.9.9.9:0]}\n":                    "f:3: dns.upstreams[0]: \"::1\" is not a resolver's IPv4 address, nor ADDRESS:PORT\nf:3: dns.upstreams[1]: \"x\" is not a resolver's IPv4 address, nor ADDRESS:PORT\nf:3: dns.upstreams[2]: \"9.9.9.9:0\" is not a resolver's IPv4 address, nor ADDRESS:PORT",
		"microvms: [{name: web, image: busybox, address: 10.0.0.1}]\n": "f:3: microvms[0].address: 10.0.0.1 is not in subnet 192.168.10.0/25",
		vm + "# two\n": "",
		"microvms:\n- {name: a, image: b, address: 192.168.10.9}\n- {name: b, image: b, address: 192.168.10.9}\n": "f:5: microvms[1].address: 192.168.10.9 is there already in line 4",
		"microvms: [{name: web, image: busybox, address: 192.168.10.3}]\n":                                        "f:3: microvms[0].address: 192.168.10.3 is host-0's",
	} {
		d, err := Parse("f", []byte(head+text))
		if err == nil {
			_, err = d.resolve("lab", nil, nobodyElse)
		}
		if got := ""; err != nil && err.Error() != want || err == nil && got != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}
