package env

import (
	"testing"

	"github.com/containerd/errdefs"

	ingotv1 "ingot/api/ingot/v1"
)

func TestPlace(t *testing.T) {
	hosts := []string{"host-0", "host-1", "host-2"}
	for _, c := range []struct {
		name  string
		facts []*ingotv1.HostFacts
		need  int64
		want  string
	}{
		{"all alike", []*ingotv1.HostFacts{{MemoryBytes: 8}, {MemoryBytes: 8}, {MemoryBytes: 8}}, 1, "host-0"},
		{"most room", []*ingotv1.HostFacts{{MemoryBytes: 8, MemoryCommittedBytes: 4}, {MemoryBytes: 7, MemoryCommittedBytes: 2}, {MemoryBytes: 8, MemoryCommittedBytes: 4}}, 5, "host-1"},
		{"fewer microVMs", []*ingotv1.HostFacts{{MemoryBytes: 8, Microvms: 2}, {MemoryBytes: 8, Microvms: 1}, {MemoryBytes: 8, Microvms: 3}}, 1, "host-1"},
		{"two are silent", []*ingotv1.HostFacts{nil, nil, {MemoryBytes: 1}}, 1, "host-2"},
		{"too much", []*ingotv1.HostFacts{{MemoryBytes: 8}, {MemoryBytes: 8}, {MemoryBytes: 8}}, 9, ""},
	} {
		facts := map[string]*ingotv1.HostFacts{}
		for i, f := range c.facts {
			if f != nil {
				facts[hosts[i]] = f
			}
		}
		got, err := Place(hosts, facts, c.need)
		if got != c.want || (c.want == "") != errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %s, %v, want %s", c.name, got, err, c.want)
		}
	}
}
