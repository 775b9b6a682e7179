package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
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
)

// TestFlintlock takes over what flintlock has left. docs/flintlock.md names the rules.
func TestFlintlock(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	f := newPredecessor(t, m)
	for _, c := range []struct {
		name string
		test func(t *testing.T, f *predecessor)
	}{
		{"taken over", takenOver},
		{"an end is noticed", endNoticed},
		{"firecracker is stopped", firecrackerStopped},
		{"cloud hypervisor is stopped", cloudHypervisorStopped},
		{"all is deleted", allDeleted},
		{"number of another process", anothersNumber},
		{"lost number", lostNumber},
		{"never started", neverStarted},
		{"delete goes on", deleteGoesOn},
		{"highest version", highestVersion},
		{"two of one version", twoOfOneVersion},
		{"unknown fields", unknownFields},
		{"not understood", notUnderstood},
		{"unnamed taps", unnamedTaps},
		{"no lease", noLease},
		{"lease without record", leaseWithoutRecord},
		{"what can't be done", whatCannotBeDone},
		{"beside ours", besideOurs},
		{"lost record", lostAdoption},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, f)
			if !t.Failed() {
				m.expectNothing(t)
			}
		})
	}
}

// get is a microVM as clients see it.
func (v *laid) get(t *testing.T) *types.MicroVM {
	t.Helper()
	r, err := v.f.m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: v.uid})
	if err != nil {
		t.Fatal(err)
	}
	return r.Microvm
}

// expectRunning finds the microVM running with the process that it had.
func (v *laid) expectRunning(t *testing.T) {
	t.Helper()
	v.f.m.await(t, v.uid, "running")
	s := v.get(t).Status
	if int(s.GetPid()) != v.process.Process.Pid || !runs(v.process) || s.GetDriver() != v.provider {
		t.Errorf("it runs as process %d of %s, was %d, which runs: %v", s.GetPid(), s.GetDriver(), v.process.Process.Pid, runs(v.process))
	}
}

// takenOver is the rule: what runs goes on, with all that it has, through one daemon
// and the next; and flintlock finds all that it has left.
func takenOver(t *testing.T, f *predecessor) {
	for _, provider := range []string{"firecracker", "cloudhypervisor"} {
		t.Run(provider, func(t *testing.T) {
			var v *laid
			f.m.restart(t, func() {
				v = f.lay(t, "taken", provider)
				v.save(t)
				v.start(t)
			})
			taps, things := v.taps(t), f.m.things(t)
			for range 2 {
				v.expectRunning(t)
				v.expectKept(t, taps)
				f.m.restart(t, func() {})
			}
			v.expectRunning(t)
			for _, thing := range things {
				if !slices.Contains(f.m.things(t), thing) {
					t.Errorf("%s is gone", thing)
				}
			}
			f.m.remove(t, v.uid)
		})
	}
}

// taps are the microVM's, with all that is known of them.
func (v *laid) taps(t *testing.T) (all []string) {
	t.Helper()
	for _, name := range []string{v.eth0, v.eth1} {
		info, err := link.Get(name)
		if err != nil {
			t.Error(err)
		}
		all = append(all, fmt.Sprintf("%+v", info))
	}
	return all
}

func (v *laid) expectKept(t *testing.T, taps []string) {
	t.Helper()
	vm := v.get(t)
	s := vm.Spec
	if s.GetUid() != v.uid || s.GetId() != v.name || s.GetNamespace() != "test" || s.GetProvider() != v.provider || s.GetVcpu() != 2 || s.GetMemoryInMb() != 1024 ||
		s.GetCreatedAt().GetSeconds() != 1784455200 || s.GetMetadata()["user-data"] != "c2VjcmV0" || !s.GetKernel().GetAddNetworkConfig() {
		t.Errorf("spec: %v", s)
	}
	if n := s.GetInterfaces(); len(n) != 2 || n[0].GetGuestMac() != "AA:FF:00:00:00:01" || n[1].GetGuestMac() != "02:00:00:00:00:07" || n[1].GetType() != types.NetworkInterface_TAP {
		t.Errorf("interfaces: %v", n)
	}
	links := vm.Status.GetNetworkInterfaces()
	if links["eth0"].GetHostDeviceName() != v.eth0 || links["eth1"].GetHostDeviceName() != v.eth1 {
		t.Errorf("taps: %v", links)
	}
	if now := v.taps(t); !slices.Equal(now, taps) || !carrier(v.eth1) {
		t.Errorf("taps: %s, were %s, and its hypervisor has it open: %v", now, taps, carrier(v.eth1))
	}
	if vm.Status.GetVolumes()["root"].GetMount().GetSource() != v.root || vm.Status.GetKernelMount().GetSource() != v.kernel+"/boot/vmlinux" {
		t.Errorf("volumes: %v, kernel %v", vm.Status.GetVolumes(), vm.Status.GetKernelMount())
	}
	if b := v.blobs(t); !slices.Equal(b, []string{"1"}) {
		t.Errorf("records in containerd: %q", b)
	}
	stream, err := v.f.m.host.Logs(t.Context(), &ingotv1.LogsRequest{Uid: v.uid})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || !strings.HasPrefix(string(r.GetData()), "earlier\nguest ready\n") {
		t.Errorf("log: %q, %v", r.GetData(), err)
	}
	if info, err := os.Stat(v.dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("its directory: %v, %v", info.Mode(), err)
	}
}

func endNoticed(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "ends", "firecracker")
		v.save(t)
		v.start(t)
	})
	v.expectRunning(t)
	v.write(t, "firecracker.stderr", "out of luck\n")
	began := time.Now()
	v.process.Process.Kill()
	f.m.await(t, v.uid, "failed")
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("noticed after %v", took)
	}
	was := v.get(t).Status
	for _, want := range []string{"out of luck", "can't start it itself yet"} {
		if !strings.Contains(was.GetReason(), want) {
			t.Errorf("reason %q, want %s", was.GetReason(), want)
		}
	}
	f.m.restart(t, func() {})
	if now := v.get(t).Status; now.GetPhase() != "failed" || now.GetReason() != was.GetReason() || now.GetRestarts() != 0 {
		t.Errorf("in the next daemon: %v, was %v", now, was)
	}
	f.m.remove(t, v.uid)
}

func (v *laid) stop(t *testing.T, timeout time.Duration) {
	t.Helper()
	if _, err := v.f.m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: v.uid, Timeout: durationpb.New(timeout)}); err != nil {
		t.Error(err)
	}
	if p := v.f.m.phase(t, v.uid); p != "stopped" || runs(v.process) {
		t.Errorf("after stop it is %s, and its process runs: %v", p, runs(v.process))
	}
}

// Firecracker has no power button, and ends by SIGTERM, or by SIGKILL when that does
// not help.
func firecrackerStopped(t *testing.T, f *predecessor) {
	var asked, stubborn *laid
	f.m.restart(t, func() {
		asked, stubborn = f.lay(t, "asked", "firecracker"), f.lay(t, "stubborn", "firecracker")
		for _, v := range []*laid{asked, stubborn} {
			v.save(t)
			v.start(t)
		}
	})
	asked.expectRunning(t)
	stubborn.expectRunning(t)
	stubborn.process.Process.Signal(syscall.SIGSTOP) // which keeps SIGTERM from it
	began := time.Now()
	asked.stop(t, time.Minute)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("SIGTERM took %v", took)
	}
	stubborn.stop(t, 300*time.Millisecond)
	for v, want := range map[*laid]syscall.Signal{asked: syscall.SIGTERM, stubborn: syscall.SIGKILL} {
		<-v.ended
		if got := v.process.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != want {
			t.Errorf("%s ended by %v", v.name, got)
		}
	}
	f.m.restart(t, func() {})
	if p := f.m.phase(t, asked.uid); p != "stopped" {
		t.Errorf("in the next daemon it is %s", p)
	}
	f.m.remove(t, asked.uid)
	f.m.remove(t, stubborn.uid)
}

// Cloud Hypervisor has a power button; one whose guest does not feel it is shut down.
func cloudHypervisorStopped(t *testing.T, f *predecessor) {
	var listens, deaf *laid
	f.m.restart(t, func() {
		listens, deaf = f.lay(t, "listens", "cloudhypervisor"), f.lay(t, "deaf", "cloudhypervisor")
		listens.save(t)
		listens.start(t)
		deaf.save(t)
		deaf.start(t, "deaf")
	})
	listens.expectRunning(t)
	deaf.expectRunning(t)
	listens.stop(t, time.Minute)
	deaf.stop(t, 500*time.Millisecond)
	for v, want := range map[*laid]string{listens: "power button\n", deaf: "power button\nshut down\n"} {
		if log, err := os.ReadFile(v.dir + "/cloudhypervisor.log"); err != nil || string(log) != want {
			t.Errorf("%s was told %q, %v", v.name, log, err)
		}
	}
	f.m.remove(t, listens.uid)
	f.m.remove(t, deaf.uid)
}

// allDeleted removes what is beside taps, snapshots, lease and directory as well.
func allDeleted(t *testing.T, f *predecessor) {
	var v *laid
	var virtiofsd *exec.Cmd
	sockets := ""
	f.m.restart(t, func() {
		v = f.lay(t, "deleted", "cloudhypervisor")
		sockets = "/run/flintlock/" + v.uid
		v.status()["vsock_path"] = sockets + "/guest-agent.vsock"
		v.save(t)
		v.save(t)
		v.start(t)
		if err := os.MkdirAll(sockets, 0o755); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sockets + "/guest-agent.vsock"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		virtiofsd, _ = v.spawn(t, "virtiofs", []string{"virtiofsd", "--socket-path=" + v.dir + "/virtiofs.sock", "--thread-pool-size=32"})
	})
	v.expectRunning(t)
	f.m.remove(t, v.uid)
	if runs(v.process) || runs(virtiofsd) {
		t.Errorf("its hypervisor runs: %v, virtiofsd: %v", runs(v.process), runs(virtiofsd))
	}
	for _, path := range []string{v.dir, sockets, v.root, v.kernel} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is there", path)
		}
	}
	if b := v.blobs(t); len(b) != 0 {
		t.Errorf("records %q", b)
	}
	os.Remove("/run/flintlock")
}

// anothersNumber is after a restart of the machine: the number in flintlock's file is
// another process's now, which is never signalled.
func anothersNumber(t *testing.T, f *predecessor) {
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Process.Kill(); other.Wait() })
	var all []*laid
	f.m.restart(t, func() {
		for _, provider := range []string{"firecracker", "cloudhypervisor"} {
			v := f.lay(t, "dead", provider)
			v.save(t)
			v.write(t, provider+".pid", fmt.Sprint(other.Process.Pid))
			v.write(t, "virtiofs.pid", fmt.Sprint(other.Process.Pid))
			all = append(all, v)
		}
	})
	for _, v := range all {
		f.m.await(t, v.uid, "failed")
		s := v.get(t).Status
		for _, want := range []string{fmt.Sprintf("process %d is another's", other.Process.Pid), "can't start it itself yet"} {
			if !strings.Contains(s.GetReason(), want) {
				t.Errorf("reason %q, want %s", s.GetReason(), want)
			}
		}
		if s.GetPid() != 0 {
			t.Errorf("process %d", s.GetPid())
		}
		f.m.remove(t, v.uid)
	}
	if !runs(other) {
		t.Error("the other process has ended")
	}
}

// lostNumber is of a hypervisor that runs, without its number or with a wrong one.
func lostNumber(t *testing.T, f *predecessor) {
	var gone, wrong *laid
	f.m.restart(t, func() {
		gone, wrong = f.lay(t, "gone", "firecracker"), f.lay(t, "wrong", "cloudhypervisor")
		for _, v := range []*laid{gone, wrong} {
			v.save(t)
			v.start(t)
		}
		os.Remove(gone.dir + "/firecracker.pid")
		wrong.write(t, "cloudhypervisor.pid", "1")
	})
	for _, v := range []*laid{gone, wrong} {
		v.expectRunning(t)
		f.m.remove(t, v.uid)
		if runs(v.process) {
			t.Errorf("%s runs after it was deleted", v.name)
		}
	}
}

func neverStarted(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "new", "firecracker")
		v.status()["state"] = "pending"
		v.save(t)
		os.RemoveAll(v.dir)
	})
	f.m.await(t, v.uid, "failed")
	if r := v.get(t).Status.GetReason(); !strings.Contains(r, "can't start it itself yet") {
		t.Errorf("reason %q", r)
	}
	f.m.remove(t, v.uid)
}

func deleteGoesOn(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "going", "firecracker")
		v.save(t)
		v.status()["state"] = "deleting"
		v.save(t)
		v.start(t)
	})
	f.m.await(t, v.uid, "")
	if runs(v.process) {
		t.Error("its hypervisor runs")
	}
}

// The tenth is higher than the ninth, whatever the order in containerd.
func highestVersion(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "versions", "firecracker")
		for i := range 11 {
			v.record["spec"].(map[string]any)["vcpu"] = i + 1
			v.save(t)
		}
		v.start(t)
	})
	v.expectRunning(t)
	if n := v.get(t).Spec.GetVcpu(); n != 11 {
		t.Errorf("the record of version %d", n)
	}
	if n := len(v.blobs(t)); n != 11 {
		t.Errorf("%d records in containerd", n)
	}
	f.m.remove(t, v.uid)
}

// flintlock loses updates: two records may have the same version, one of which says
// that it is being deleted.
func twoOfOneVersion(t *testing.T, f *predecessor) {
	var all []*laid
	f.m.restart(t, func() {
		for _, states := range [][]string{{"deleting", "created"}, {"created", "deleting"}} {
			v := f.lay(t, "twice", "firecracker")
			for _, state := range states {
				v.version = 0
				v.status()["state"] = state
				v.save(t)
			}
			all = append(all, v)
		}
	})
	for _, v := range all {
		f.m.await(t, v.uid, "")
	}
}

// unknownFields are kept in containerd, and said.
func unknownFields(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "later", "firecracker")
		v.record["spec"].(map[string]any)["cpu_config"] = map[string]any{"features_to_enable": []string{"x"}}
		v.save(t)
		v.start(t)
	})
	v.expectRunning(t)
	text, err := os.ReadFile(v.dir + "/vm.json")
	if err != nil || !strings.Contains(string(text), "spec.cpu_config") {
		t.Errorf("the record: %s, %v", text, err)
	}
	if log, err := os.ReadFile(f.m.dir + "/daemon.log"); err != nil || !strings.Contains(string(log), "fields=spec.cpu_config") {
		t.Errorf("the log does not say it: %v", err)
	}
	f.m.remove(t, v.uid)
}

// notUnderstood is left as it is, and told of; when it is mended, it is taken over.
func notUnderstood(t *testing.T, f *predecessor) {
	for name, blob := range map[string]func(v *laid) (version, text string){
		"torn":              func(*laid) (string, string) { return "2", `{"id": "test/` },
		"another provider":  func(v *laid) (string, string) { return "2", v.changed("firecracker", "bhyve") },
		"another's":         func(v *laid) (string, string) { return "2", v.changed(v.uid, "01JA1B2C3D4E5F6G7H8J9KMNPQ") },
		"a strange version": func(v *laid) (string, string) { return "two", v.changed("", "") },
		"the host's device": func(v *laid) (string, string) { return "2", v.changed(v.eth1, "br0") },
	} {
		t.Run(name, func(t *testing.T) {
			var v *laid
			f.m.restart(t, func() {
				v = f.lay(t, "odd", "firecracker")
				v.save(t)
				v.blob(t, first(blob(v)), second(blob(v)))
				v.start(t)
			})
			things, files := f.m.things(t), listing(t, v.dir)
			if all := f.m.list(t); len(all) != 0 {
				t.Errorf("microVMs: %v", all)
			}
			facts, err := f.m.host.Facts(t.Context(), &emptypb.Empty{})
			if err != nil {
				t.Fatal(err)
			}
			if b := facts.BrokenRecords; len(b) != 1 || b[0].Path != v.dir+"/vm.json" || b[0].Error == "" {
				t.Errorf("broken records: %v", b)
			}
			f.m.restart(t, func() {})
			if now := f.m.things(t); !slices.Equal(now, things) || !runs(v.process) || !slices.Equal(listing(t, v.dir), files) || len(v.blobs(t)) != 2 {
				t.Errorf("it is not left as it was: %s", now)
			}
			v.process.Process.Kill()
			f.m.restart(t, func() { v.release(t); v.forget(t) })
		})
	}
}

// changed is the record with a word replaced.
func (v *laid) changed(old, word string) string {
	text, err := json.Marshal(v.record)
	if err != nil {
		panic(err)
	}
	return strings.ReplaceAll(string(text)+" ", old, word)
}

func first(a, _ string) string  { return a }
func second(_, b string) string { return b }

// listing names what is in a directory, with its modes and sizes.
func listing(t *testing.T, dir string) (all []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%s %s %d", f.Name(), info.Mode(), info.Size()))
	}
	return all
}

// unnamedTaps is of a flintlock that was killed before it wrote them down.
func unnamedTaps(t *testing.T, f *predecessor) {
	var fc, ch *laid
	f.m.restart(t, func() {
		fc, ch = f.lay(t, "fc", "firecracker"), f.lay(t, "ch", "cloudhypervisor")
		for _, v := range []*laid{fc, ch} {
			v.status()["state"], v.status()["network_interfaces"] = "pending", map[string]any{}
			v.save(t)
			v.start(t)
		}
	})
	for _, v := range []*laid{fc, ch} {
		v.expectRunning(t)
		v.taps(t) // are there
	}
	if n := fc.get(t).Status.GetNetworkInterfaces(); n["eth1"].GetHostDeviceName() != fc.eth1 {
		t.Errorf("taps of its configuration file: %v", n)
	}
	f.m.remove(t, fc.uid)
	f.m.remove(t, ch.uid)
	f.m.restart(t, func() {}) // nobody's: the next daemon removes them
}

// noLease is of a hypervisor that containerd knows nothing of any more. Nor are taps
// removed while one is there that nobody knows.
func noLease(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "unheld", "firecracker")
		v.save(t)
		v.start(t)
		v.release(t)
	})
	facts, err := f.m.host.Facts(t.Context(), &emptypb.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if b := facts.BrokenRecords; len(b) != 1 || b[0].Path != v.dir+"/vm.json" || !strings.Contains(b[0].Error, "no lease") {
		t.Errorf("broken records: %v", b)
	}
	if v.taps(t); !runs(v.process) {
		t.Error("it was ended")
	}
	v.process.Process.Kill()
	f.m.restart(t, func() { v.forget(t) })
}

// forget removes the directory, which flintlock's files are in.
func (v *laid) forget(t *testing.T) {
	t.Helper()
	for dir := v.dir; filepath.Base(dir) != "vm"; dir = filepath.Dir(dir) {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

func leaseWithoutRecord(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "unrecorded", "firecracker")
		v.start(t)
	})
	if things := f.m.things(t); !slices.Contains(things, "lease "+v.lease) || !runs(v.process) {
		t.Errorf("it is not left: %s", things)
	}
	v.process.Process.Kill()
	f.m.restart(t, func() { v.forget(t) }) // and now it is nothing but a leftover lease
}

// whatCannotBeDone is refused, and changes nothing.
func whatCannotBeDone(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "limits", "firecracker")
		v.save(t)
		v.start(t)
	})
	v.expectRunning(t)
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"restart": func() error { _, err := f.m.host.Restart(ctx, &ingotv1.RestartRequest{Uid: v.uid}); return err },
		"pause":   func() error { _, err := f.m.host.Pause(ctx, &ingotv1.PauseRequest{Uid: v.uid}); return err },
		"resize": func() error {
			_, err := f.m.host.Resize(ctx, &ingotv1.ResizeRequest{Uid: v.uid, SizeInMb: 1 << 10})
			return err
		},
		"metadata": func() error {
			_, err := f.m.host.Update(ctx, &ingotv1.UpdateRequest{Uid: v.uid, Metadata: map[string]string{"user-data": "b3RoZXI="}})
			return err
		},
		"exec": func() error {
			stream, err := f.m.host.Exec(ctx)
			if err == nil {
				err = stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{Uid: v.uid, Args: []string{"true"}}}})
			}
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"console": func() error {
			stream, err := f.m.host.Console(ctx)
			if err == nil {
				err = stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Uid{Uid: v.uid}})
			}
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"create": func() error {
			s := spec("another")
			s.Provider = &v.provider
			_, err := f.m.vms.CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{Microvm: s})
			return err
		},
	} {
		if code := status.Code(call()); code != codes.Unimplemented && code != codes.FailedPrecondition && code != codes.InvalidArgument {
			t.Errorf("%s: %v", name, code)
		}
	}
	v.expectRunning(t)
	v.stop(t, time.Minute)
	if _, err := f.m.host.Start(ctx, &ingotv1.StartRequest{Uid: v.uid}); err != nil {
		t.Error(err)
	}
	f.m.await(t, v.uid, "failed")
	if r := v.get(t).Status.GetReason(); !strings.Contains(r, "can't start it itself yet") {
		t.Errorf("reason %q", r)
	}
	f.m.remove(t, v.uid)
}

// besideOurs: ours, whose copies have the same labels, are not flintlock's.
func besideOurs(t *testing.T, f *predecessor) {
	ours, was := f.m.run(t, "ours")
	noted(t, f.m, ours)
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "theirs", "firecracker")
		v.save(t)
		v.start(t)
		os.RemoveAll(f.m.vmDir("ours", ours)) // found by its copy
	})
	v.expectRunning(t)
	f.m.awaitRunning(t, ours)
	if now := f.m.status(t, ours); now.GetDriver() != "qemu" || tap(now) != tap(was) {
		t.Errorf("it was %v, is %v", was, now)
	}
	f.m.remove(t, v.uid)
	f.m.awaitRunning(t, ours)
	f.m.remove(t, ours)
}

// lostAdoption is of a record of ours, made of flintlock's, that is lost.
func lostAdoption(t *testing.T, f *predecessor) {
	var v *laid
	f.m.restart(t, func() {
		v = f.lay(t, "lost", "firecracker")
		v.save(t)
		v.start(t)
	})
	v.expectRunning(t)
	for _, file := range []string{"vm.json", "status.json"} {
		f.m.restart(t, func() { os.Remove(filepath.Join(v.dir, file)) })
		v.expectRunning(t)
		v.expectKept(t, v.taps(t))
	}
	f.m.remove(t, v.uid)
}

// TestFlintlockKilled kills the daemon before each step of taking over. However far it
// got, the next one finds the microVM running, with all that it has.
func TestFlintlockKilled(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	f := newPredecessor(t, m)
	rounds, step := 0, 1
	for ; ; step += *killEvery {
		m.killDaemon()
		v := f.lay(t, "killed", "firecracker")
		v.save(t)
		v.start(t)
		taps := v.taps(t)
		what := f.killInAdoption(t, step, v)
		m.startDaemon(t)
		v.expectRunning(t)
		v.expectKept(t, taps)
		m.remove(t, v.uid)
		m.expectNothing(t)
		if t.Failed() {
			t.Fatalf("step %d: killed before %s", step, what)
		}
		if what == "" {
			break
		}
		rounds++
	}
	t.Logf("killed at %d of %d steps", rounds, step)
}

// killInAdoption starts the daemon, and kills it before the step of that number. It
// returns what that was, or nothing if the microVM was taken over before.
func (f *predecessor) killInAdoption(t *testing.T, step int, v *laid) (what string) {
	t.Helper()
	// A daemon begins nothing before containerd answers: so it is caught.
	f.m.containerd.Process.Signal(syscall.SIGSTOP)
	f.m.daemon = f.m.start(t, "daemon.log", "host", "--config", f.m.dir+"/config.yaml")
	pid := f.m.daemon.Process.Pid
	await(t, "the daemon to reach for containerd", func() bool {
		log, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
		return strings.Contains(string(log), "containerd.sock") && threads(pid) > 3
	})
	tracer, lines := startTracer(t, pid, step, pid)
	words := make(chan string, 1)
	go func() {
		defer close(words)
		for lines.Scan() {
			words <- strings.TrimPrefix(lines.Text(), "killed before ")
		}
	}()
	f.m.containerd.Process.Signal(syscall.SIGCONT)
	taken := func() bool {
		return f.m.reached("running")
	}
	for deadline := time.Now().Add(30 * time.Second); what == ""; {
		select {
		case what = <-words:
		case <-time.After(5 * time.Millisecond):
		}
		if what == "" && taken() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("step %d: neither killed nor taken over", step)
		}
	}
	tracer.Process.Kill()
	for range words {
	}
	tracer.Wait()
	f.m.killDaemon()
	return what
}

func threads(pid int) int {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	return len(all)
}
