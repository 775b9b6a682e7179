package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/link"
	"ingot/internal/need"
)

// TestRecover hurts what a host is made of, and sees it get well: files that are
// lost or broken, hypervisors that don't answer, guests that don't listen.
func TestRecover(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	for _, c := range []struct {
		name string
		hurt func(t *testing.T, m *testMachine)
	}{
		{"a broken record", brokenRecord},
		{"a lost directory", lostDirectory},
		{"a lost status", lostStatus},
		{"a mute hypervisor", muteHypervisor},
		{"a deaf guest", deafGuest},
		{"a change of mind", changeOfMind},
		{"a guest that reboots", rebootingGuest},
		{"the same uid", sameUID},
		{"metrics", metrics},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.hurt(t, m)
			if !t.Failed() {
				m.expectNothing(t)
			}
		})
	}
}

// run makes a microVM that runs, and returns its status.
func (m *testMachine) run(t *testing.T, name string, words ...string) (uid string, s *types.MicroVMStatus) {
	t.Helper()
	p := spec(name)
	p.Kernel.Cmdline = map[string]string{}
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		p.Kernel.Cmdline[key] = value
	}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: p})
	if err != nil {
		t.Fatal(err)
	}
	uid = r.Microvm.Spec.GetUid()
	m.awaitRunning(t, uid)
	return uid, m.status(t, uid)
}

func (m *testMachine) status(t *testing.T, uid string) *types.MicroVMStatus {
	t.Helper()
	for _, vm := range m.list(t) {
		if vm.Spec.GetUid() == uid {
			return vm.Status
		}
	}
	t.Fatalf("there is no %s", uid)
	return nil
}

func (m *testMachine) vmDir(name, uid string) string {
	return filepath.Join(m.dir, "state/vm/test", name, uid)
}

// restart ends the daemon, changes the world, and starts it again.
func (m *testMachine) restart(t *testing.T, meanwhile func()) {
	t.Helper()
	m.killDaemon()
	meanwhile()
	m.startDaemon(t)
}

func brokenRecord(t *testing.T, m *testMachine) {
	good, _ := m.run(t, "good")
	bad, s := m.run(t, "bad")
	path := m.vmDir("bad", bad) + "/vm.json"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m.restart(t, func() { os.WriteFile(path, []byte("{\"format\": 1, no"), 0o600) }) // a torn one would come back
	m.await(t, good, "running")
	if all := m.list(t); len(all) != 1 {
		t.Errorf("%d microVMs", len(all))
	}
	facts, err := m.host.Facts(t.Context(), &emptypb.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if b := facts.BrokenRecords; len(b) != 1 || b[0].Path != path || b[0].Error == "" {
		t.Errorf("broken records: %v", b)
	}
	things := m.things(t)
	for _, want := range []string{"lease flintlock/test/bad/" + bad, fmt.Sprint("process ", s.GetPid()), "link " + tap(s)} {
		if !slices.Contains(things, want) {
			t.Errorf("%s is gone", want)
		}
	}
	m.restart(t, func() { os.WriteFile(path, text, 0o600) })
	m.await(t, bad, "running")
	if now := m.status(t, bad); now.GetPid() != s.GetPid() {
		t.Errorf("process %d, was %d", now.GetPid(), s.GetPid())
	}
	m.remove(t, good)
	m.remove(t, bad)
}

func tap(s *types.MicroVMStatus) string { return s.GetNetworkInterfaces()["eth1"].GetHostDeviceName() }

func lostDirectory(t *testing.T, m *testMachine) {
	one, was := m.run(t, "one")
	two, _ := m.run(t, "two")
	disk := was.GetVolumes()["root"].GetMount().GetSource()
	const word = "what the guest has written"
	if err := os.WriteFile(disk, []byte(word), 0o600); err != nil {
		t.Fatal(err)
	}
	noted(t, m, one, two)
	m.restart(t, func() { os.RemoveAll(m.vmDir("one", one)) })
	m.await(t, one, "running")
	m.await(t, two, "running")
	now := m.status(t, one)
	if text, err := os.ReadFile(now.GetVolumes()["root"].GetMount().GetSource()); err != nil || !bytes.HasPrefix(text, []byte(word)) {
		t.Errorf("its disk: %.40q, %v", text, err)
	}
	if now.GetPid() == was.GetPid() {
		t.Errorf("process %d is still said to be the one", now.GetPid())
	}
	if n := len(m.hypervisors()); n != 2 {
		t.Errorf("%d hypervisors", n)
	}
	m.restart(t, func() { os.RemoveAll(m.dir + "/state/vm") })
	m.await(t, one, "running")
	m.await(t, two, "running")
	if n := len(m.hypervisors()); n != 2 {
		t.Errorf("all lost: %d hypervisors", n)
	}
	m.remove(t, one)
	m.remove(t, two)
}

// noted waits until containerd has the copies of records.
func noted(t *testing.T, m *testMachine, uids ...string) {
	t.Helper()
	for _, uid := range uids {
		await(t, "the copy of "+uid, func() bool {
			found := false
			err := m.images.Recorded(t.Context(), map[string]string{"dev.liquidmetal.flintlockd/uid": uid}, func(map[string]string, []byte) error {
				found = true
				return nil
			})
			return err == nil && found
		})
	}
}

func lostStatus(t *testing.T, m *testMachine) {
	uid, was := m.run(t, "lost")
	m.restart(t, func() { os.Remove(m.vmDir("lost", uid) + "/status.json") })
	m.await(t, uid, "running")
	now := m.status(t, uid)
	if now.GetPid() != was.GetPid() || !now.GetStartedAt().AsTime().Equal(was.GetStartedAt().AsTime()) || now.GetDriver() != "qemu" || tap(now) != tap(was) {
		t.Errorf("it was %v, is %v", was, now)
	}
	if path := now.GetVolumes()["root"].GetMount().GetSource(); path == "" || path != was.GetVolumes()["root"].GetMount().GetSource() {
		t.Errorf("its root is at %q", path)
	}
	// The end is not missed, and not counted twice.
	m.restart(t, func() {
		syscall.Kill(int(now.GetPid()), syscall.SIGKILL)
		os.Remove(m.vmDir("lost", uid) + "/status.json")
	})
	await(t, "it to run again", func() bool { s := m.status(t, uid); return s.GetPhase() == "running" && s.GetPid() != now.GetPid() })
	if s := m.status(t, uid); s.GetRestarts() != 1 {
		t.Errorf("%d restarts", s.GetRestarts())
	}
	// Nor does an end count that was before somebody wanted it to run again.
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	path := m.vmDir("lost", uid) + "/vm.json"
	m.restart(t, func() {
		os.Remove(m.vmDir("lost", uid) + "/status.json")
		text, _ := os.ReadFile(path) // as a daemon leaves it that is killed as soon as it has said yes
		text = bytes.Replace(text, []byte(`"stopped": true`), fmt.Appendf(nil, `"started_at": %q`, time.Now().Format(time.RFC3339Nano)), 1)
		os.WriteFile(path, text, 0o600)
	})
	m.await(t, uid, "running")
	m.restart(t, func() { os.Remove(m.vmDir("lost", uid) + "/status.json") })
	m.remove(t, uid)
	if n := len(m.hypervisors()); n != 0 {
		t.Errorf("%d hypervisors", n)
	}
}

func muteHypervisor(t *testing.T, m *testMachine) {
	stopped, s := m.run(t, "stopped")
	deleted, d := m.run(t, "deleted")
	m.restart(t, func() {
		syscall.Kill(int(s.GetPid()), syscall.SIGSTOP)
		syscall.Kill(int(d.GetPid()), syscall.SIGSTOP)
	})
	m.await(t, stopped, "running")
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: stopped, Timeout: durationpb.New(200 * time.Millisecond)}); err != nil {
		t.Error(err)
	}
	if phase, n := m.phase(t, stopped), len(m.hypervisors()); phase != "stopped" || n != 1 {
		t.Errorf("stopped: %s, and %d hypervisors", phase, n)
	}
	m.remove(t, deleted)
	m.remove(t, stopped)
}

// deafGuest does not stop when it is asked to. That keeps no daemon from ending that is
// told twice; the next one insists when the time is over.
func deafGuest(t *testing.T, m *testMachine) {
	uid, _ := m.run(t, "deaf", "hollow.deaf=1")
	began := time.Now()
	const patience = 2 * time.Second
	answer := make(chan error, 1)
	go func() {
		_, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid, Timeout: durationpb.New(patience)})
		answer <- err
	}()
	m.await(t, uid, "stopping")
	m.endAtOnce(t)
	if took := time.Since(began); took > patience-200*time.Millisecond {
		t.Errorf("the daemon has ended after %v", took)
	}
	<-answer
	m.startDaemon(t)
	m.await(t, uid, "stopped")
	if took := time.Since(began); took < patience || took > patience+5*time.Second {
		t.Errorf("it was stopped after %v", took)
	}
	if n := len(m.hypervisors()); n != 0 {
		t.Errorf("%d hypervisors", n)
	}
	m.remove(t, uid)
}

// changeOfMind starts what is just about to stop: it stops, and runs again.
func changeOfMind(t *testing.T, m *testMachine) {
	uid, was := m.run(t, "mind", "hollow.slow=300ms")
	answer := make(chan error, 1)
	go func() {
		_, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid})
		answer <- err
	}()
	m.await(t, uid, "stopping")
	if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
		t.Error(err)
	}
	if err := <-answer; status.Code(err) != codes.FailedPrecondition {
		t.Errorf("stop: %v", err)
	}
	await(t, "it to run again", func() bool {
		s := m.status(t, uid)
		return s.GetPhase() == "running" && s.GetPid() != was.GetPid()
	})
	if s := m.status(t, uid); s.GetRestarts() != 0 || s.GetRetry() != 0 {
		t.Errorf("%d restarts, %d tries", s.GetRestarts(), s.GetRetry())
	}
	m.remove(t, uid)
}

// rebootingGuest restarts as soon as it is ready: it is started less and less often.
func rebootingGuest(t *testing.T, m *testMachine) {
	uid, _ := m.run(t, "reboots", "hollow.reboot=20ms")
	await(t, "the third try", func() bool { return m.status(t, uid).GetRetry() >= 3 })
	s := m.status(t, uid)
	if s.GetRestarts() > 4 || !strings.Contains(s.GetReason(), "reboot") {
		t.Errorf("%d restarts, reason %q", s.GetRestarts(), s.GetReason())
	}
	// Four seconds are to wait, unless somebody does not want to.
	began := time.Now()
	if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
		t.Error(err)
	}
	await(t, "it to be started", func() bool { return m.status(t, uid).GetRestarts() > s.GetRestarts() })
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it was started %v after that was asked for", took)
	}
	m.remove(t, uid)
}

func sameUID(t *testing.T, m *testMachine) {
	uid, _ := m.run(t, "same")
	again := spec("same")
	again.Uid, again.Kernel.Cmdline = &uid, nil
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: again})
	if err != nil || r.Microvm.Spec.GetUid() != uid {
		t.Errorf("the same: %v, %v", r, err)
	}
	again.MemoryInMb++
	if _, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: again}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("another one: %v", err)
	}
	if links, err := link.List(); err != nil || len(m.list(t)) != 1 {
		t.Errorf("%v, %v", links, err)
	}
	m.remove(t, uid)
}

func metrics(t *testing.T, m *testMachine) {
	uid, _ := m.run(t, "metrics")
	lines := func() int {
		text, _ := os.ReadFile(m.vmDir("metrics", uid) + "/qemu.metrics")
		return strings.Count(string(text), "resident_bytes")
	}
	await(t, "metrics of the start", func() bool { return lines() == 1 })
	stream, err := m.host.Logs(t.Context(), &ingotv1.LogsRequest{Uid: uid, File: "metrics"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Error(err)
	}
	if n := lines(); n != 2 {
		t.Errorf("%d lines once they were read", n)
	}
	m.remove(t, uid)
}
