package main

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// reconfigure starts the daemon anew with other limits.
func (m *testMachine) reconfigure(t testing.TB, more string) {
	t.Helper()
	m.killDaemon()
	m.configure(t, more)
	m.startDaemon(t)
}

// refused says whether an error is that there is no room, in these words.
func refused(t testing.TB, err error, words string) {
	t.Helper()
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), words) {
		t.Errorf("%v, want ResourceExhausted: %s", err, words)
	}
}

func (m *testMachine) facts(t testing.TB) *ingotv1.HostFacts {
	t.Helper()
	f, err := m.host.Facts(t.Context(), &emptypb.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestLimits holds a host to what it may promise: also those who come at once are let
// in no further, what is stopped gives its place to others, and what runs stays,
// whatever the limit becomes.
func TestLimits(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	m.reconfigure(t, "max-microvms: 3\nmemory-overcommit: 0\nvcpu-overcommit: 0\n")
	uids := m.crowd(t, 3, "microvm: 1 microVM asked for, and 3 of 3 are promised")
	for _, uid := range uids {
		m.await(t, uid, "running")
	}
	ask := func(name string) error {
		_, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec(name)})
		return err
	}
	start := func(uid string) error {
		_, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid})
		return err
	}
	stopped := uids[0]
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: stopped}); err != nil {
		t.Fatal(err)
	}
	late := m.create(t, "late") // what is stopped has given its place back
	refused(t, start(stopped), "max-microvms")
	_, err := m.host.Restart(t.Context(), &ingotv1.RestartRequest{Uid: stopped})
	refused(t, err, "max-microvms")
	if p := m.phase(t, stopped); p != "stopped" {
		t.Errorf("the one that was refused is %s", p)
	}
	m.await(t, late, "running")
	m.remove(t, late)
	if err := start(stopped); err != nil {
		t.Error(err)
	}
	m.await(t, stopped, "running")
	if err := start(stopped); err != nil {
		t.Errorf("one that runs is started: %v", err)
	}

	before := fmt.Sprint(m.hypervisors())
	m.reconfigure(t, "max-microvms: 1\nmemory-overcommit: 0\nvcpu-overcommit: 0\n")
	await(t, "all to be found", func() bool { return m.running(t) == 3 })
	if after := fmt.Sprint(m.hypervisors()); after != before {
		t.Errorf("a lower limit: %s run, and %s did", after, before)
	}
	refused(t, ask("fourth"), "3 of 1 are promised")
	m.killOne(t, stopped)
	m.await(t, stopped, "running") // it crashed, which costs nobody the place
	if _, err := m.host.Restart(t.Context(), &ingotv1.RestartRequest{Uid: stopped}); err != nil {
		t.Errorf("restart of one that runs: %v", err)
	}
	if f := m.facts(t); f.MicrovmsCommitted != 3 || f.MicrovmsLimit != 1 || f.VcpusLimit != 0 || f.MemoryLimitBytes != 0 {
		t.Errorf("facts: %d of %d", f.MicrovmsCommitted, f.MicrovmsLimit)
	}
	for _, uid := range uids {
		m.remove(t, uid)
	}
	m.expectNothing(t)
}

// TestMemoryAndCPULimits is the same of what a spec says.
func TestMemoryAndCPULimits(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	all := m.facts(t)
	reserved := all.MemoryBytes>>20 - 300
	m.reconfigure(t, fmt.Sprintf("memory-overcommit: 1\nreserved-memory: %d\nvcpu-overcommit: 0\n", reserved))
	for _, uid := range m.crowd(t, 2, "memory_in_mb: 128 MiB asked for, and 256 of ") {
		m.remove(t, uid)
	}
	m.reconfigure(t, fmt.Sprintf("memory-overcommit: 0\nvcpu-overcommit: %f\n", 2/float64(all.Vcpus)+0.001))
	uids := m.crowd(t, 2, "vcpu: 1 CPUs asked for, and 2 of 2 are promised")
	var busy sync.WaitGroup
	for _, uid := range uids { // stopped and started by several at once
		for range 3 {
			busy.Go(func() {
				for range 5 {
					m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid})
					m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid})
				}
			})
		}
	}
	busy.Wait()
	for _, uid := range uids {
		if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
			t.Error(err)
		}
		m.await(t, uid, "running")
	}
	if f := m.facts(t); f.VcpusCommitted != 2 || f.MemoryCommittedBytes != 256<<20 || f.VcpusLimit != 2 {
		t.Errorf("%d CPUs of %d, %d bytes of memory are promised", f.VcpusCommitted, f.VcpusLimit, f.MemoryCommittedBytes)
	}
	for _, uid := range uids {
		m.remove(t, uid)
	}
	if f := m.facts(t); f.MicrovmsCommitted != 0 || f.VcpusCommitted != 0 || f.MemoryCommittedBytes != 0 {
		t.Errorf("nobody is there, and promised are %d, %d, %d", f.MicrovmsCommitted, f.VcpusCommitted, f.MemoryCommittedBytes)
	}
	m.expectNothing(t)
}

// crowd asks for many microVMs at once, of which so many must be let in.
func (m *testMachine) crowd(t *testing.T, room int, words string) (uids []string) {
	t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	var refusals atomic.Int32
	const asked = 20
	for i := range asked {
		all.Go(func() {
			r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec(fmt.Sprint("crowd-", i))})
			if err != nil {
				refused(t, err, words)
				refusals.Add(1)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			uids = append(uids, r.Microvm.Spec.GetUid())
		})
	}
	all.Wait()
	if len(uids) != room || len(m.list(t)) != room || refusals.Load() != asked-int32(room) {
		t.Fatalf("%d were let in, %d are there, %d were refused; there is room for %d", len(uids), len(m.list(t)), refusals.Load(), room)
	}
	return uids
}

// killOne ends a microVM's hypervisor, and returns when the daemon has heard of it.
func (m *testMachine) killOne(t *testing.T, uid string) {
	t.Helper()
	r, err := m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: uid})
	if err != nil {
		t.Fatal(err)
	}
	pid := int(r.Microvm.Status.GetPid())
	if pid <= 0 { // it has ended by itself
		return
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "the end to be heard of", func() bool {
		now, err := m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: uid})
		return err == nil && now.Microvm.Status.GetPid() != r.Microvm.Status.GetPid()
	})
}
