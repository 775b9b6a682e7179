package qemu_test

import (
	"os"
	"testing"

	"ingot/internal/need"
	"ingot/internal/vmm"
	"ingot/internal/vmm/qemu"
	"ingot/internal/vmm/vmmtest"
)

// TestHollow holds the stand-in to what QEMU itself is held to, and with it the
// driver to a hypervisor that does everything at once.
func TestHollow(t *testing.T) {
	need.Root(t)
	binary := os.Getenv("INGOT_HOLLOW")
	if binary == "" {
		binary = vmmtest.Hollow(t)
		t.Setenv("INGOT_HOLLOW", binary) // for the processes that the suite starts of itself
	}
	// Any ELF file passes for a kernel.
	guest := vmmtest.Guest{Kernel: binary, Initrd: binary, Cmdline: []string{"hollow.agent=echo"}}
	vmmtest.Run(t, func(testing.TB) vmm.Driver { return qemu.New(qemu.Config{Binary: binary}) }, guest)
}
