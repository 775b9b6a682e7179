package env

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

func TestPlace(t *testing.T) {
	hosts := []string{"host-0", "host-1", "host-2"}
	const mib = 1 << 20
	of := func(limit, committed int64) *ingotv1.HostFacts {
		return &ingotv1.HostFacts{MemoryBytes: limit * mib, MemoryLimitBytes: limit * mib, MemoryCommittedBytes: committed * mib}
	}
	free, few, none := of(800, 0), of(800, 0), of(0, 0)
	free.Microvms, few.Microvms, none.MemoryBytes = 2, 1, 100*mib
	noCPU, noPlace := of(800, 0), of(800, 0)
	noCPU.VcpusLimit, noCPU.VcpusCommitted = 4, 3
	noPlace.MicrovmsLimit, noPlace.MicrovmsCommitted = 7, 7
	for _, c := range []struct {
		name  string
		facts []*ingotv1.HostFacts
		need  int32
		want  string // what chooses, or what the error says
	}{
		{"all alike", []*ingotv1.HostFacts{of(800, 0), of(800, 0), of(800, 0)}, 100, "host-0"},
		{"most room", []*ingotv1.HostFacts{of(800, 400), of(700, 200), of(800, 400)}, 500, "host-1"},
		{"fewer microVMs", []*ingotv1.HostFacts{free, few, free}, 100, "host-1"},
		{"two are silent", []*ingotv1.HostFacts{nil, nil, of(100, 0)}, 100, "host-2"},
		{"too much", []*ingotv1.HostFacts{of(800, 0), of(900, 1), nil}, 900, "host-0: 900 MiB asked for, and 0 of 800 are promised; host-1: 900 MiB asked for, and 1 of 900 are promised"},
		{"no limit", []*ingotv1.HostFacts{none, of(800, 0)}, 900, "host-0"},
		{"CPUs and places", []*ingotv1.HostFacts{noCPU, noPlace}, 100, "host-0: 2 CPUs asked for, and 3 of 4 are promised; host-1: 1 microVM asked for, and 7 of 7 are promised"},
		{"more room, but no place", []*ingotv1.HostFacts{noPlace, of(200, 0)}, 100, "host-1"},
	} {
		facts := map[string]*ingotv1.HostFacts{}
		for i, f := range c.facts {
			if f != nil {
				facts[hosts[i]] = f
			}
		}
		got, err := Place(hosts, facts, &types.MicroVMSpec{MemoryInMb: c.need})
		if err != nil && errdefs.IsResourceExhausted(err) {
			_, got, _ = strings.Cut(err.Error(), ": ")
		}
		if got != c.want {
			t.Errorf("%s: %s, %v, want %s", c.name, got, err, c.want)
		}
	}
}
