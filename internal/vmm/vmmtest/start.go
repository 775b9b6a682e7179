package vmmtest

import (
	"context"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/vmm"
)

// failedStart tries what can't work, and finds nothing left of it.
func (s suite) failedStart(t *testing.T) {
	closed := blank(t)
	closed.Close()
	notKernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(notKernel, []byte("not a kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	for name, breakIt := range map[string]func(*vmm.Config){
		"no kernel":     func(c *vmm.Config) { c.Kernel = "/nonexistent" },
		"not a kernel":  func(c *vmm.Config) { c.Kernel = notKernel },
		"no initrd":     func(c *vmm.Config) { c.Initrd = "/nonexistent" },
		"no memory":     func(c *vmm.Config) { c.Memory = 1 << 30 },
		"closed tap":    func(c *vmm.Config) { c.NICs = []vmm.NIC{{ID: "eth0", File: closed, MAC: mac}} },
		"not a tap":     func(c *vmm.Config) { c.NICs = []vmm.NIC{{ID: "eth0", File: blank(t), MAC: mac}} },
		"closed disk":   func(c *vmm.Config) { c.Disks = []vmm.Disk{{ID: "root", File: closed}} },
		"no disk":       func(c *vmm.Config) { c.Disks = []vmm.Disk{{ID: "root"}} },
		"too many CPUs": func(c *vmm.Config) { c.VCPU = 100000 },
	} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t, "vmmtest-failed")
			c := s.config(dir)
			breakIt(&c)
			m, err := s.driver(t).Start(t.Context(), c)
			if err == nil {
				m.Kill()
				t.Fatal("it started")
			}
			t.Log(err)
			s.expectNothing(t, dir)
		})
	}
}

// expectNothing finds no files, no process and nothing to attach to.
func (s suite) expectNothing(t testing.TB, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		t.Errorf("left behind: %s", f.Name())
	}
	if pids := processes(filepath.Base(dir)); len(pids) != 0 {
		t.Errorf("left behind: processes %v", pids)
	}
	if _, err := s.driver(t).Attach(within(t), dir); !errdefs.IsNotFound(err) {
		t.Errorf("attach to nothing: %v", err)
	}
}

// processes are those that have a microVM's name on their command line.
func processes(name string) (found []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "\x00"+name+"\x00") {
			found = append(found, filepath.Base(filepath.Dir(f)))
		}
	}
	return found
}

// cancelledStart gives up at moments all over a start.
func (s suite) cancelledStart(t *testing.T) {
	dir := stateDir(t, "vmmtest-cancelled")
	for range 30 {
		after := time.Duration(rand.Int64N(int64(120 * time.Millisecond)))
		ctx, cancel := context.WithTimeout(t.Context(), after)
		m, err := s.driver(t).Start(ctx, s.config(dir))
		cancel()
		if err == nil {
			// It was done before. It lives on after ctx.
			if err := m.Kill(); err != nil {
				t.Error(err)
			}
			m.Close()
			clear, _ := filepath.Glob(filepath.Join(dir, "*"))
			for _, f := range clear {
				os.Remove(f)
			}
			continue
		}
		s.expectNothing(t, dir)
	}
}

// several starts guests at the same time.
func (s suite) several(t *testing.T) {
	const count = 4
	type result struct {
		m   vmm.Machine
		err error
	}
	results := make(chan result)
	for range count {
		c := s.config(stateDir(t, "vmmtest-several"))
		go func() {
			m, err := s.driver(t).Start(t.Context(), c)
			results <- result{m, err}
		}()
	}
	pids := map[int]bool{}
	for range count {
		r := <-results
		if r.err != nil {
			t.Error(r.err)
			continue
		}
		pids[r.m.PID()] = true
		defer r.m.Close()
		defer r.m.Kill()
		expectState(t, r.m, vmm.Running)
	}
	if len(pids) != count {
		t.Errorf("processes %v, want %d", pids, count)
	}
}
