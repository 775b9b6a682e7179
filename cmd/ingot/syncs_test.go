package main

import (
	"os/exec"
	"strings"
	"sync"
	"testing"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// TestSyncsOfCreate counts what waits for the disk between a create and its
// hypervisor: in the daemon and in containerd.
func TestSyncsOfCreate(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	counts := map[string]func() map[string]int{
		"daemon": m.count(t, m.daemon), "containerd": m.count(t, m.containerd),
	}
	// It answers late, and what is done after that is not counted.
	s := spec("counted")
	s.Kernel.Cmdline = map[string]string{"hollow.delay": "2s"}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
	if err != nil {
		t.Fatal(err)
	}
	uid := r.Microvm.Spec.GetUid()
	await(t, "its process", func() bool { return len(m.hypervisors()) == 1 })
	syncs := 0
	for name, count := range counts {
		changes := count()
		t.Logf("%s: %v", name, changes)
		syncs += changes["fsync"] + changes["fdatasync"]
	}
	t.Logf("%d syncs", syncs)
	// The record, and the lease with its volumes: a create that waits for no disk
	// is not kept.
	if syncs < 1 || syncs > 3 {
		t.Errorf("%d syncs, want 1 to 3", syncs)
	}
	m.remove(t, uid)
}

// count follows a process, and gives what it has done when it is asked.
func (m *testMachine) count(t *testing.T, process *exec.Cmd) (done func() map[string]int) {
	t.Helper()
	c, lines := startTracer(t, process.Process.Pid, 0, 0)
	changes := map[string]int{}
	var reader sync.WaitGroup
	reader.Go(func() {
		for lines.Scan() {
			changes[strings.TrimSpace(lines.Text())]++
		}
	})
	return func() map[string]int {
		c.Process.Kill()
		reader.Wait()
		c.Wait()
		return changes
	}
}
