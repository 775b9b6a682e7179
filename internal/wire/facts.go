package wire

import (
	"fmt"
	"os"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/link"
)

// Interfaces are this machine's interfaces; owners says by name which microVM one
// belongs to.
func Interfaces(owners map[string]string) ([]*ingotv1.InterfaceFacts, error) {
	links, err := link.List()
	if err != nil {
		return nil, err
	}
	var facts []*ingotv1.InterfaceFacts
	for _, l := range links {
		f := &ingotv1.InterfaceFacts{
			Name: l.Name, Index: int32(l.Index), Mac: l.MAC.String(), Up: l.Up, Kind: l.Kind, Master: l.Master, VmUid: owners[l.Name],
		}
		for _, a := range l.Addresses {
			f.Addresses = append(f.Addresses, a.String())
		}
		facts = append(facts, f)
	}
	return facts, nil
}

// RSS is how much memory this process has, in bytes (proc_pid_statm(5)).
func RSS() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	var size, resident int64
	fmt.Sscan(string(b), &size, &resident)
	return resident * int64(os.Getpagesize())
}
