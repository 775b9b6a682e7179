package main

import (
	"context"
	"flag"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// killEvery says which of the steps are tried: every one, every third, …
var killEvery = flag.Int("kill.every", 7, "kill before every n-th step")

// acts are what a daemon is killed in: what must be so before, the call, and the
// phase that it leads to.
var acts = []struct {
	name, before, after string
	call                func(ctx context.Context, m *testMachine, uid string) error
}{
	{"create", "", "running", func(ctx context.Context, m *testMachine, _ string) error {
		_, err := m.vms.CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{Microvm: spec("killed")})
		return err
	}},
	{"stop", "running", "stopped", func(ctx context.Context, m *testMachine, uid string) error {
		_, err := m.host.Stop(ctx, &ingotv1.StopRequest{Uid: uid})
		return err
	}},
	{"start", "stopped", "running", func(ctx context.Context, m *testMachine, uid string) error {
		_, err := m.host.Start(ctx, &ingotv1.StartRequest{Uid: uid})
		return err
	}},
	{"resize", "running", "running", func(ctx context.Context, m *testMachine, uid string) error {
		_, err := m.host.Resize(ctx, &ingotv1.ResizeRequest{Uid: uid, SizeInMb: 64})
		return err
	}},
	{"delete", "running", "", func(ctx context.Context, m *testMachine, uid string) error {
		_, err := m.vms.DeleteMicroVM(ctx, &v1alpha1.DeleteMicroVMRequest{Uid: uid})
		return err
	}},
}

// TestKilled kills the daemon, and then containerd, before each step of all that is
// done to a microVM. The steps are the daemon's system calls that change
// something. However far it got, the microVM becomes what was asked for, or what
// it was if nobody was told otherwise; and nothing is left of it in the end.
func TestKilled(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	for _, victim := range []string{"daemon", "containerd"} {
		for _, act := range acts {
			t.Run(victim+" in "+act.name, func(t *testing.T) {
				began, rounds, step := time.Now(), 0, 1
				for ; ; step += *killEvery {
					rounds++
					uid := ""
					if act.before != "" {
						uid = m.bring(t, act.before)
					}
					fired := m.killBefore(t, victim, step, func(ctx context.Context) error { return act.call(ctx, m, uid) }, func() bool {
						return m.reached(act.after)
					})
					m.converge(t, act.after, fired)
					if t.Failed() {
						t.Fatalf("step %d: %s", step, fired.what)
					}
					if fired.what == "" {
						break
					}
				}
				t.Logf("%d of %d steps in %v", rounds-1, step-1, time.Since(began).Round(time.Millisecond))
			})
		}
	}
}

// bring makes a microVM that is in a phase.
func (m *testMachine) bring(t *testing.T, phase string) (uid string) {
	t.Helper()
	uid = m.create(t, "killed")
	m.await(t, uid, "running")
	if phase == "stopped" {
		if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid}); err != nil {
			t.Fatal(err)
		}
	}
	return uid
}

// reached says whether the only microVM is in a phase, or gone if that is empty.
func (m *testMachine) reached(phase string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r, err := m.vms.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
	if err != nil {
		return false
	}
	if phase == "" {
		return len(r.Microvm) == 0
	}
	return len(r.Microvm) == 1 && r.Microvm[0].Status.GetPhase() == phase
}

// killing is what became of a kill.
type killing struct {
	what string // the step; empty if the end came before it
	told bool   // the call was answered
}

// killBefore makes a call, kills the victim before the daemon's step of that
// number, and starts it again.
func (m *testMachine) killBefore(t *testing.T, victim string, step int, call func(context.Context) error, done func() bool) killing {
	t.Helper()
	process := map[string]*exec.Cmd{"daemon": m.daemon, "containerd": m.containerd}[victim]
	c, lines := startTracer(t, m.daemon.Process.Pid, step, process.Process.Pid)
	words := make(chan string, 1)
	go func() {
		defer close(words)
		for lines.Scan() {
			words <- strings.TrimPrefix(lines.Text(), "killed before ")
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- call(ctx) }()
	var k killing
	deadline := time.After(20 * time.Second)
	for waiting := true; waiting; {
		select {
		case err := <-answer:
			k.told, answer = err == nil, nil
			if err != nil && victim != "daemon" {
				t.Errorf("the call: %v", err)
			}
		case k.what = <-words:
			waiting = false
		case <-time.After(2 * time.Millisecond):
			if answer == nil && done() {
				waiting = false
			}
		case <-deadline:
			t.Fatalf("step %d: neither killed nor done", step)
		}
	}
	if k.what == "" || victim != "daemon" {
		c.Process.Kill() // which lets go of the daemon
	}
	if late, ok := <-words; ok { // what goes on after the end was a step, too
		k.what = late
	}
	c.Wait()
	if k.what != "" {
		process.Process.Kill() // the tracer's own may not have come to it
		process.Wait()
		map[string]func(testing.TB){"daemon": m.startDaemon, "containerd": m.startContainerd}[victim](t)
	}
	if answer != nil {
		k.told = <-answer == nil
	}
	return k
}

// converge waits until the microVM is what it should be, removes it, and finds
// nothing of it.
func (m *testMachine) converge(t *testing.T, phase string, k killing) {
	t.Helper()
	vms := m.list(t)
	if k.told || k.what == "" {
		await(t, "the microVM to be "+phase, func() bool { return m.reached(phase) })
	} else if len(vms) == 1 {
		// Nobody was told. It settles, wherever.
		await(t, "the microVM to settle", func() bool {
			return m.reached("running") || m.reached("stopped") || m.reached("")
		})
	}
	want := map[bool]int{true: 1}[m.reached("running")]
	if n := len(m.hypervisors()); n != want {
		t.Errorf("%d hypervisors run, want %d", n, want)
	}
	for _, vm := range m.list(t) {
		// What is on record is so, or becomes so: the daemon has just looked.
		if size := int64(vm.Spec.RootVolume.GetSizeInMb()); size != 0 && m.reached("running") {
			await(t, "the guest to see what is recorded", func() bool { return m.guestSizes(t, vm.Spec.GetUid()) == fmt.Sprint(size<<20) })
			m.expectDisks(t, vm.Spec.GetUid(), size)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		m.vms.DeleteMicroVM(ctx, &v1alpha1.DeleteMicroVMRequest{Uid: vm.Spec.GetUid()}, grpc.WaitForReady(true))
		cancel()
		m.await(t, vm.Spec.GetUid(), "")
	}
	m.expectNothing(t)
}
