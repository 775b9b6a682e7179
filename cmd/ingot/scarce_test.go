package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/health/grpc_health_v1"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// says waits until the reason of a microVM's state has these words.
func (m *testMachine) says(t *testing.T, uid, words string) {
	t.Helper()
	var last string
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if last = m.status(t, uid).GetReason(); strings.Contains(last, words) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the reason is %q, want %q", last, words)
		}
	}
}

// TestNoContainerd: without containerd, or with one that hangs, all that needs none goes
// on, all that does says what it waits for, and does it once it is back.
func TestNoContainerd(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	for _, c := range []struct {
		name       string
		end, begin func()
	}{
		{"killed", func() { m.containerd.Process.Kill(); m.containerd.Wait() }, func() { m.startContainerd(t) }},
		{"hangs", func() { m.containerd.Process.Signal(syscall.SIGSTOP) }, func() { m.containerd.Process.Signal(syscall.SIGCONT) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			stays, stops, crashes, goes := m.create(t, "stays"), m.create(t, "stops"), m.create(t, "crashes"), m.create(t, "goes")
			for _, uid := range []string{stays, stops, crashes, goes} {
				m.await(t, uid, "running")
			}
			pid := m.status(t, stays).GetPid()
			c.end()
			began := time.Now()
			late := m.create(t, "late")
			t.Logf("a create was accepted after %v", time.Since(began).Round(time.Millisecond))
			began = time.Now()
			if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: stops}); err != nil {
				t.Error(err)
			}
			m.killOne(t, crashes)
			if _, err := m.vms.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: goes}); err != nil {
				t.Error(err)
			}
			if out := m.ask(t, stays, "echo here"); !strings.Contains(out, "here") {
				t.Errorf("exec: %q", out)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("a stop, a crash, a delete and an exec took %v", took)
			}
			for _, uid := range []string{late, crashes, goes} {
				m.says(t, uid, "containerd does not answer")
			}
			if s := m.status(t, stays); s.GetPhase() != "running" || s.GetPid() != pid {
				t.Errorf("the one that runs is %v", s)
			}
			await(t, "health checks to hear of it", func() bool { return !m.serves(t) })
			c.begin()
			for _, uid := range []string{stays, late, crashes} {
				m.await(t, uid, "running")
			}
			m.await(t, goes, "")
			await(t, "health checks to hear of that", func() bool { return m.serves(t) })
			for _, uid := range []string{stays, late, crashes, stops} {
				m.remove(t, uid)
			}
			m.expectNothing(t)
		})
	}
}

// serves is what health checks are told.
func (m *testMachine) serves(t *testing.T) bool {
	t.Helper()
	r, err := grpc_health_v1.NewHealthClient(m.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status == grpc_health_v1.HealthCheckResponse_SERVING
}

// TestDiskFull: no room where microVMs are recorded refuses what is new and leaves
// nothing of it, harms nobody who runs, and is forgotten once there is room.
func TestDiskFull(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachineOn(t, func(dir string) {
		state := dir + "/state"
		if err := os.Mkdir(state, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=2m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(state, unix.MNT_DETACH) })
	})
	stays, crashes := m.create(t, "stays"), m.create(t, "crashes")
	m.await(t, stays, "running")
	m.await(t, crashes, "running")
	pid := m.status(t, stays).GetPid()
	before := m.settled(t)
	filler := m.dir + "/state/filler"
	m.fill(t, filler)
	_, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec("late")})
	refused(t, err, "no space left on device")
	_, err = m.host.Update(t.Context(), &ingotv1.UpdateRequest{Uid: stays, Labels: map[string]string{"a": "b"}})
	refused(t, err, "no space left on device")
	_, err = m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: stays})
	refused(t, err, "no space left on device")
	if left := slices.DeleteFunc(m.things(t), func(s string) bool { return s == "file "+filler || slices.Contains(before, s) }); len(left) > 0 {
		t.Errorf("a refused create left %q", left)
	}
	await(t, "one that can't start again to say why", func() bool {
		s := m.status(t, crashes)
		if s.GetPhase() == "running" { // its end makes some room, in which it may have started
			m.killOne(t, crashes)
		}
		m.fill(t, filler)
		return strings.Contains(s.GetReason(), "no space left on device")
	})
	if s := m.status(t, stays); s.GetPhase() != "running" || s.GetPid() != pid || s.GetReason() != "" {
		t.Errorf("the one that runs is %v", s)
	}
	m.restart(t, func() {}) // with a full disk
	m.await(t, stays, "running")
	if s := m.status(t, stays); s.GetPid() != pid {
		t.Errorf("a new daemon runs it as %d, not %d", s.GetPid(), pid)
	}
	m.killOne(t, stays)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	m.await(t, crashes, "running")
	m.await(t, stays, "running")
	// What could not be written down is.
	await(t, "the status of "+stays, func() bool {
		b, err := os.ReadFile(filepath.Join(m.vmDir("stays", stays), "status.json"))
		return err == nil && bytes.Contains(b, fmt.Appendf(nil, `"pid": %d,`, m.status(t, stays).GetPid()))
	})
	await(t, "the journal", func() bool {
		b, err := os.ReadFile(m.dir + "/state/events.log")
		return err == nil && bytes.Contains(b, fmt.Appendf(nil, `"pid":%d,`, m.status(t, crashes).GetPid())) && bytes.HasSuffix(b, []byte("}\n"))
	})
	m.remove(t, stays)
	m.remove(t, crashes)
	m.expectNothing(t)
}

// fill leaves no room in a file's file system.
func (m *testMachine) fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 {
		for err = error(nil); err == nil; {
			_, err = f.Write(make([]byte, size))
		}
	}
}

// settled is what there is once nothing more comes: a microVM that runs is still written
// down, beside its record.
func (m *testMachine) settled(t *testing.T) []string {
	t.Helper()
	last := m.things(t)
	for same := 0; same < 5; same++ {
		time.Sleep(100 * time.Millisecond)
		if now := m.things(t); !slices.Equal(now, last) {
			last, same = now, 0
		}
	}
	return last
}

// TestDescriptors: a daemon that may open no more files says so of what needs some, and
// goes on when it may. It has raised its own limit as far as it could.
func TestDescriptors(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	var first, now unix.Rlimit
	limit := func(set, old *unix.Rlimit) {
		t.Helper()
		if err := unix.Prlimit(m.daemon.Process.Pid, unix.RLIMIT_NOFILE, set, old); err != nil {
			t.Fatal(err)
		}
	}
	m.killDaemon()
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &first); err != nil {
		t.Fatal(err)
	}
	m.daemon = exec.Command("prlimit", "--nofile=64:4000", "ingot", "host", "--config", m.dir+"/config.yaml") // execs
	log, err := os.OpenFile(m.dir+"/daemon.log", os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	m.daemon.Stdout, m.daemon.Stderr = log, log
	if err := m.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	log.Close()
	m.list(t)
	if limit(nil, &now); now.Cur < 3999 {
		t.Errorf("the daemon may open %d files of %d", now.Cur, now.Max)
	}
	stays := m.create(t, "stays")
	m.await(t, stays, "running")
	limit(&unix.Rlimit{Cur: uint64(m.usage(t).files) + 6, Max: now.Max}, nil)
	var uids []string
	refusals := 0
	for i := range 8 {
		r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec(fmt.Sprint("late-", i))})
		if err != nil {
			refused(t, err, "too many open files")
			refusals++
			continue
		}
		uids = append(uids, r.Microvm.Spec.GetUid())
	}
	short := func() (reason string) {
		for _, uid := range uids {
			if s := m.status(t, uid); s.GetPhase() != "running" && strings.Contains(s.GetReason(), "too many open files") {
				return s.GetReason()
			}
		}
		return ""
	}
	if refusals == 0 {
		await(t, "one to say that there are no more files", func() bool { return short() != "" })
	}
	t.Logf("%d refused; a reason: %s", refusals, short())
	var conns []net.Conn // and nobody new is let in
	for range 10 {
		c, err := net.Dial("tcp", "127.0.0.1:9090")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if s := m.status(t, stays); s.GetPhase() != "running" {
		t.Errorf("the one that runs is %v", s)
	}
	for _, c := range conns {
		c.Close()
	}
	limit(&now, nil)
	for _, uid := range uids {
		m.await(t, uid, "running")
	}
	for _, uid := range append(uids, stays) {
		m.remove(t, uid)
	}
	m.expectNothing(t)
}

// TestDeadRegistry: microVMs whose images never come delay nobody else's create or
// delete.
func TestDeadRegistry(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	dead, err := net.Listen("tcp", "127.0.0.1:0") // it accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	m.lives(t, 5)
	idle := m.lives(t, 40)
	const blocked = 50
	var all sync.WaitGroup
	uids := make([]string, blocked)
	for i := range blocked {
		all.Go(func() {
			s := spec(fmt.Sprint("blocked-", i))
			s.RootVolume.Source.ContainerSource = ptr(fmt.Sprintf("%s/image-%d:latest", dead.Addr(), i))
			r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: s})
			if err != nil {
				t.Error(err)
				return
			}
			uids[i] = r.Microvm.Spec.GetUid()
		})
	}
	all.Wait()
	pulls, queue := 0, 0
	await(t, "all to wait", func() bool {
		pulls, queue = 0, 0
		for _, vm := range m.list(t) {
			switch step, _, _ := strings.Cut(vm.Status.GetStep(), " "); step {
			case "queue":
				queue++
			case "resolve", "pull":
				pulls++
			}
		}
		return pulls == 4 && queue == blocked-4
	})
	t.Logf("%d pull, %d wait for their turn", pulls, queue)
	busy := m.lives(t, 40)
	for _, what := range []string{"create", "delete"} {
		for _, p := range []int{50, 99} {
			was, is := centile(idle[what], p), centile(busy[what], p)
			t.Logf("%s p%d: idle %v, with %d blocked %v", what, p, was, blocked, is)
			if is > 3*was+20*time.Millisecond {
				t.Errorf("%s p%d: idle %v, with %d blocked %v", what, p, was, blocked, is)
			}
		}
	}
	for _, uid := range uids {
		if _, err := m.vms.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: uid}); err != nil {
			t.Error(err)
		}
	}
	await(t, "all to be gone", func() bool { return len(m.list(t)) == 0 })
	m.expectNothing(t)
}

// centile is a percentile of sorted times.
func centile(all []time.Duration, p int) time.Duration {
	return all[min(len(all)-1, len(all)*p/100)].Round(10 * time.Microsecond)
}

// lives has microVMs come and go, one after the other, and says how long it took until
// one ran, and until it was gone.
func (m *testMachine) lives(t *testing.T, n int) map[string][]time.Duration {
	t.Helper()
	took := map[string][]time.Duration{}
	for i := range n {
		began := time.Now()
		uid := m.create(t, fmt.Sprint("lives-", i))
		m.awaitRunning(t, uid)
		took["create"] = append(took["create"], time.Since(began))
		began = time.Now()
		m.remove(t, uid)
		took["delete"] = append(took["delete"], time.Since(began))
	}
	for _, all := range took {
		slices.Sort(all)
	}
	return took
}

// TestOldRecords: a record with nothing in it of what a spec must have, as an older
// version or somebody's hand may have left it, ends no daemon and can be deleted.
func TestOldRecords(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	stays := m.create(t, "stays")
	m.await(t, stays, "running")
	names := map[string]string{
		"bare":      `{}`,
		"nulls":     `{"kernel":null,"root":null,"volumes":null,"interfaces":null,"metadata":null,"initrd":null}`,
		"no-kernel": `{"vcpu":1,"memory":128,"root":{"id":"root","image":"test.local/root:latest"},"interfaces":[{"id":"eth1","kind":"tap"}]}`,
		"no-root":   `{"vcpu":1,"memory":128,"kernel":{"image":"test.local/kernel:latest","path":"boot/vmlinux"},"interfaces":[{},{}]}`,
		"absurd":    `{"vcpu":-7,"memory":-1,"kernel":{"image":"test.local/kernel:latest","path":"../../etc/passwd"},"root":{"id":"../..","image":"::"},"volumes":[{},{}],"initrd":{}}`,
	}
	uids := map[string]string{}
	m.restart(t, func() {
		for name, text := range names {
			uid := fmt.Sprintf("01ARZ3NDEKTSV4RRFFQ69G5F%02d", len(uids))
			uids[name] = uid
			dir := m.vmDir(name, uid)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			inner := strings.TrimSuffix(text[1:], "}")
			if inner != "" {
				inner = "," + inner
			}
			record := fmt.Sprintf(`{"format":1,"user":%d,"spec":{"uid":%q,"namespace":"test","name":%q%s}}`, 700100+len(uids), uid, name, inner)
			if err := os.WriteFile(dir+"/vm.json", []byte(record), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	})
	for name, uid := range uids {
		await(t, name+" to say what is wrong", func() bool { s := m.status(t, uid); return s.GetReason() != "" && s.GetPhase() != "running" })
		t.Logf("%s is %s: %s", name, m.status(t, uid).GetPhase(), m.status(t, uid).GetReason())
	}
	m.await(t, stays, "running")
	m.remove(t, m.create(t, "another"))
	for _, uid := range uids {
		m.remove(t, uid)
	}
	m.remove(t, stays)
	m.expectNothing(t)
}
