package main

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// TestTurns makes many microVMs at once whose guests take their time: only some
// boot at the same time, and all come to run. One that waits can be deleted.
func TestTurns(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	turns := 2 * runtime.NumCPU()
	uids := make([]string, 3*turns)
	for i := range uids {
		s := spec(fmt.Sprint("turn-", i))
		s.Kernel.Cmdline = map[string]string{"hollow.delay": "500ms"}
		r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
		if err != nil {
			t.Fatal(err)
		}
		uids[i] = r.Microvm.Spec.GetUid()
	}
	steps := func() (booting, waiting int) {
		for _, vm := range m.list(t) {
			switch {
			case vm.Status.GetStep() == "turn":
				waiting++
			case vm.Status.GetPid() > 0 && !vm.Status.GetAgentReady():
				booting++
			}
		}
		return booting, waiting
	}
	await(t, "some to wait", func() bool { _, waiting := steps(); return waiting > 0 })
	for _, vm := range m.list(t) {
		if vm.Status.GetStep() == "turn" {
			m.remove(t, vm.Spec.GetUid())
			break
		}
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		booting, _ := steps()
		if booting > turns {
			t.Fatalf("%d boot at the same time, want at most %d", booting, turns)
		}
		if len(m.hypervisors()) == len(uids)-1 && booting == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d run", len(m.hypervisors()), len(uids)-1)
		}
	}
	for _, vm := range m.list(t) {
		m.remove(t, vm.Spec.GetUid())
	}
	m.expectNothing(t)
}
