package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/need"
)

// TestGuestAddresses: what a guest may send from is in the kernel when it starts,
// changes while it runs, and outlives daemons; and what is refused is told.
func TestGuestAddresses(t *testing.T) {
	need.Binary(t, "nft")
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	for _, command := range []string{
		"ip link add bond0.1000 type veth peer name seg0", "ip link set seg0 master br0 up",
		"ip link set bond0.1000 up", "ip addr add 192.168.10.3/25 dev bond0.1000",
	} {
		sh(t, command)
	}
	const segment = "segment: bond0.1000\nsegment-port: seg0\nmachines: [192.168.10.2, 192.168.10.3]\nhub: 192.168.10.2\n"
	m.reconfigure(t, segment)
	s := spec("one")
	s.AllowedAddresses = []string{"192.168.10.25", "10.42.0.0/16"}
	s.Interfaces[0].Address = &types.StaticAddress{Address: "192.168.10.20/25"}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
	if err != nil {
		t.Fatal(err)
	}
	uid := r.Microvm.Spec.GetUid()
	m.await(t, uid, "running")
	expectAllowed(t, "10.42.0.0/16", "192.168.10.20", "192.168.10.25")

	update := func(u *ingotv1.UpdateRequest) error {
		u.Uid = uid
		_, err := m.host.Update(t.Context(), u)
		return err
	}
	if err := update(&ingotv1.UpdateRequest{AllowAddresses: []string{"192.168.10.24", "fd00::/64", "192.168.10.25"}, DisallowAddresses: []string{"10.42.0.0/16"}}); err != nil {
		t.Fatal(err)
	}
	expectAllowed(t, "192.168.10.20", "192.168.10.24", "192.168.10.25", "fd00::/64")
	for _, wrong := range []string{"10.0.0.1/24", "x"} {
		if err := update(&ingotv1.UpdateRequest{AllowAddresses: []string{wrong}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("allow %s: %v", wrong, err)
		}
	}
	// As if DHCP had answered, and the guest had sent; package nat sees to these.
	device := regexp.MustCompile(`"(fltap[0-9a-f]+)"`).FindStringSubmatch(sh(t, "nft list set bridge ingot guests"))[1]
	sh(t, fmt.Sprintf(`nft 'add element bridge ingot addresses { %q . 192.168.10.40 timeout 1h }'`, device))
	sh(t, fmt.Sprintf(`nft 'add element bridge ingot refused { %q . 192.168.10.77 counter packets 5 bytes 100 timeout 10m }'`, device))
	m.restart(t, func() {})
	m.await(t, uid, "running")
	expectAllowed(t, "192.168.10.20", "192.168.10.24", "192.168.10.25", "fd00::/64")
	if got := sh(t, "nft list set bridge ingot addresses"); !strings.Contains(got, "192.168.10.40") {
		t.Errorf("a daemon forgets what DHCP gave: %s", got)
	}
	if got := sh(t, "nft list set bridge ingot unheld"); strings.Contains(got, "fltap") {
		t.Errorf("a daemon holds a guest to nothing: %s", got)
	}
	told := func(text string) func() bool {
		return func() bool {
			for _, vm := range m.list(t) {
				for _, c := range vm.Status.GetConditions() {
					return c.GetType() == "AddressesAllowed" && text != "" && strings.Contains(c.GetMessage(), text)
				}
			}
			return text == ""
		}
	}
	await(t, "the condition", told("eth1 sends from 192.168.10.77 (5 packets)"))
	if !strings.Contains(m.read(t, "daemon.log"), "192.168.10.77") {
		t.Error("the log does not say what was refused")
	}
	if err := update(&ingotv1.UpdateRequest{AllowAddresses: []string{"192.168.10.77"}}); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the condition", told(""))
	m.remove(t, uid)
	expectAllowed(t)
	await(t, "the end of the lease", func() bool { return !strings.Contains(sh(t, "nft list set bridge ingot addresses"), "fltap") })
}

// expectAllowed holds what the kernel has against what it should have.
func expectAllowed(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for _, set := range []string{"allowed", "allowed6"} {
		out, err := exec.Command("nft", "list", "set", "bridge", "ingot", set).CombinedOutput()
		if err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
		for _, found := range regexp.MustCompile(`"fltap[0-9a-f]+" \. ([0-9a-f.:/-]+)`).FindAllSubmatch(out, -1) {
			got = append(got, string(found[1]))
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("allowed are %q, want %q", got, want)
	}
}
