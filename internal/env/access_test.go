package env

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/nat"
)

func TestAccessChanges(t *testing.T) {
	have := func(name, uid string) placed {
		return placed{"host-0", &types.MicroVM{Spec: &types.MicroVMSpec{Namespace: "default", Id: name, Uid: &uid}}}
	}
	port := func(outside, inside uint32) *ingotv1.Port {
		return &ingotv1.Port{Protocol: "tcp", Port: outside, To: inside}
	}
	declared := func(name string, ports ...string) MicroVM {
		m := MicroVM{Name: name, Image: "busybox"}
		for _, text := range ports {
			p, err := nat.ParsePort(text)
			if err != nil {
				t.Fatal(err)
			}
			m.Ports = append(m.Ports, p)
		}
		return m
	}
	all := []MicroVM{
		declared("same", "2:2", "1:1"), declared("new", "3:3", "203.0.113.2:4:4/udp"), declared("less"), declared("other", "6:60"), declared("none"), declared("absent", "7:7"),
	}
	there := []placed{have("same", "A"), have("new", "B"), have("less", "C"), have("other", "D"), have("none", "E"), have("by-hand", "F")}
	all[0].Egress, all[4].Egress = []string{"deny private"}, []string{"deny all"}
	ports := map[string][]*ingotv1.Port{"A": {port(1, 1), port(2, 2)}, "C": {port(5, 5)}, "D": {port(6, 6)}, "F": {port(8, 8)}}
	var got []string
	for _, c := range accessChanges(all, there, access{ports, map[string][]string{"A": {"deny private"}, "D": {"deny all"}}}) {
		got = append(got, c.lines()...)
	}
	want := []string{
		"~ microVM default/new: ports: 203.0.113.2:4:4/udp, 3:3/tcp", "~ microVM default/less: ports: none", "~ microVM default/other: ports: 6:60/tcp",
		"~ microVM default/other: egress: everything", "~ microVM default/none: egress: deny all",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// A port makes no other microVM.
	if a, b := declared("a", "1:1"), declared("a"); a.print() != b.print() {
		t.Error("a port is part of what a microVM is")
	}
}
