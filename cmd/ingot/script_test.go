package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain makes this test binary all the names that the program answers to.
func TestMain(m *testing.M) {
	programs := map[string]func(){
		"tracer":      tracer,
		"firecracker": standIn, "cloud-hypervisor-static": standIn, "virtiofsd": standIn,
	}
	for _, name := range []string{"ingot", "flintlockd", "ctr", "dhcp-lease-list", "dhcp-leases-list"} {
		programs[name] = main
	}
	testscript.Main(m, programs)
}

// TestScript runs what needs no environment.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true,
		Condition: func(name string) (bool, error) {
			if name != "root" {
				return false, fmt.Errorf("unknown condition %s", name)
			}
			return os.Getuid() == 0, nil
		},
	})
}
