package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
	"ingot/internal/vmm"
)

func testInstance(t *testing.T) *instance {
	t.Helper()
	r := testRecord(t.TempDir(), "one")
	if err := r.create(); err != nil {
		t.Fatal(err)
	}
	return newInstance(New(Config{Log: slog.New(slog.DiscardHandler)}), r)
}

func TestEnded(t *testing.T) {
	const short, long = time.Second, 2 * steady
	for name, c := range map[string]struct {
		cause   vmm.Cause
		lived   time.Duration
		policy  vm.Restart
		asked   bool
		phase   vm.Phase
		retry   int
		stopped bool // by record
	}{
		"power off":             {vmm.PowerOff, short, "", false, vm.Stopped, 3, true},
		"crash":                 {vmm.Panic, short, "", false, vm.Pending, 4, false},
		"crash after a while":   {vmm.Panic, long, "", false, vm.Pending, 1, false},
		"crash, never again":    {vmm.Killed, long, vm.RestartNever, false, vm.Failed, 3, true},
		"reboot at once":        {vmm.Reboot, short, "", false, vm.Pending, 4, false},
		"reboot after a while":  {vmm.Reboot, long, "", false, vm.Pending, 0, false},
		"reboot, on failure":    {vmm.Reboot, long, vm.RestartOnFailure, false, vm.Stopped, 3, true},
		"asked to, and crashed": {vmm.Error, short, "", true, vm.Stopped, 3, true},
		"wanted again":          {vmm.Stopped, short, "", false, vm.Pending, 3, false},
		"asked to":              {vmm.Stopped, long, "", true, vm.Stopped, 3, true},
	} {
		t.Run(name, func(t *testing.T) {
			v := testInstance(t)
			v.spec.Restart, v.record.Stopped = c.policy, c.asked
			now := time.Now()
			v.status = vm.Status{Phase: vm.Running, Retry: 3, StartedAt: now.Add(-c.lived), PID: 7}
			v.ended(vmm.Exit{Cause: c.cause, At: now})
			s := v.view().Status
			if s.Phase != c.phase || s.Retry != c.retry || v.record.Stopped != c.stopped || s.PID != 0 {
				t.Errorf("%+v, stopped %v", s, v.record.Stopped)
			}
			if again := c.phase == vm.Pending && c.retry > 0 && c.cause != vmm.Stopped; again != s.RetryAt.After(now) {
				t.Errorf("the next try is at %v", s.RetryAt)
			}
		})
	}
}

func TestOnlyMistakesAreFinal(t *testing.T) {
	bridge := fmt.Errorf("make interface eth1: no bridge br7: %w", errdefs.ErrNotFound)
	for name, c := range map[string]struct {
		err   error
		tries int // until it has failed; 0: it goes on
	}{
		"no such bridge":       {bridge, 0},
		"a broken file":        {fmt.Errorf("read registry-auth.json: %w", errdefs.ErrInvalidArgument), 0},
		"no such image":        {fmt.Errorf("prepare images: %w", mistaken(fmt.Errorf("pull x: %w", errdefs.ErrNotFound))), hopeless},
		"no such file":         {fmt.Errorf("prepare images: %w", mistaken(fmt.Errorf("file /x: %w", errdefs.ErrInvalidArgument))), 1},
		"the registry is away": {fmt.Errorf("prepare images: %w", mistaken(fmt.Errorf("pull x: %w", errdefs.ErrUnavailable))), 0},
	} {
		t.Run(name, func(t *testing.T) {
			v := testInstance(t)
			v.status.Retry = 20 // crashes are counted apart
			for try := 1; try <= 2*hopeless; try++ {
				v.failed(c.err)
				if failed := v.status.Phase == vm.Failed; failed != (c.tries > 0 && try >= c.tries) {
					t.Fatalf("after try %d it is %s", try, v.status.Phase)
				}
			}
		})
	}
	v := testInstance(t)
	for range 2 * hopeless {
		v.failed(mistaken(fmt.Errorf("pull: %w", errdefs.ErrNotFound)))
		v.failed(bridge) // another error between
	}
	if v.status.Phase == vm.Failed {
		t.Error("tries that failed otherwise count as mistakes")
	}
}

// What may be mended is tried for as long as somebody wants; what is to be deleted, and
// what waits for somebody else, for ever.
func TestMaximumRetry(t *testing.T) {
	for _, c := range []struct {
		deleting bool
		err      error
		ends     bool
	}{
		{false, errors.New("make interface: no"), true},
		{true, errors.New("make interface: no"), false},
		{false, fmt.Errorf("pull: %w", errdefs.ErrUnavailable), false},
	} {
		v := testInstance(t)
		v.host.c.MaximumRetry, v.record.Deleting = 3, c.deleting
		for try := 1; try <= 6; try++ {
			v.failed(c.err)
			failed := v.status.Phase == vm.Failed
			if failed != (try > 3 && c.ends) || failed == v.status.RetryAt.After(time.Now()) {
				t.Errorf("%+v: after try %d it is %s, and tried again at %v", c, try, v.status.Phase, v.status.RetryAt)
			}
		}
	}
}

// Hosts of one kernel do not know each other.
func TestUsersDifferBetweenHosts(t *testing.T) {
	a, b := New(Config{}), New(Config{})
	one, other := a.freeUser("01ARZ3NDEKTSV4RRFFQ69G5FAV"), b.freeUser("01ARZ3NDEKTSV4RRFFQ69G5FAW")
	if one == other || one < firstUser {
		t.Errorf("users %d and %d", one, other)
	}
	if again := a.freeUser("01ARZ3NDEKTSV4RRFFQ69G5FAV"); again == one {
		t.Errorf("user %d twice", one)
	}
}

// Whoever asks for something does not wait for the end of a back-off.
func TestWantEndsBackOff(t *testing.T) {
	for name, change := range map[string]func(*record) error{
		"start":        func(r *record) error { return r.stop(false) },
		"delete again": func(r *record) error { r.Deleting = true; return nil },
	} {
		v := testInstance(t)
		v.record.Deleting = name == "delete again"
		v.failed(errors.New("no"))
		v.failed(errors.New("no"))
		if err := v.want(change); err != nil {
			t.Fatal(err)
		}
		if s := v.view().Status; !s.RetryAt.IsZero() || s.Retry != 0 || len(v.wake) != 1 {
			t.Errorf("%s: %+v, woken %d", name, s, len(v.wake))
		}
	}
}

// Who waits for a pause that somebody has ended is told so, and does not wait on.
func TestPauseIsOverruled(t *testing.T) {
	v := testInstance(t)
	h := v.host
	h.vms[v.spec.UID], v.status.Phase = v, vm.Running
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var pausing sync.WaitGroup
	pausing.Go(func() {
		if _, err := h.Pause(ctx, v.spec.UID); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("pause: %v", err)
		}
	})
	for !v.wants(func(r record) bool { return r.Paused }) {
		time.Sleep(time.Millisecond)
	}
	if _, err := h.Resume(ctx, v.spec.UID); err != nil { // nobody has paused it yet
		t.Errorf("resume: %v", err)
	}
	pausing.Wait()
}

// A paused microVM whose end nobody has seen is not paused any more, either.
func TestPausedAndLost(t *testing.T) {
	v := testInstance(t)
	v.record.Paused, v.status.Phase = true, vm.Paused
	v.find(t.Context())
	if s := v.view().Status; v.record.Paused || s.Phase != vm.Pending || s.Restarts != 1 {
		t.Errorf("paused: %v, %+v", v.record.Paused, s)
	}
}

// Labels that are changed by many at once were what they became before.
func TestLabelsInOrder(t *testing.T) {
	v := testInstance(t)
	h := v.host
	h.vms[v.spec.UID], v.record.Spec.Kernel.Path = v, "vmlinux"
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 50 {
				if _, err := h.Update(v.spec.UID, func(m *vm.Mutable) { m.Labels[fmt.Sprint(i)] = fmt.Sprint(j) }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	was := map[string]string{}
	for _, e := range h.events.pending {
		if e.Was == nil { // a change of something else
			continue
		}
		if !maps.Equal(e.Was, was) {
			t.Fatalf("event %d: they were %d labels, and the event before has %d", e.Seq, len(e.Was), len(was))
		}
		was = e.Labels
	}
	if len(was) != 8 {
		t.Errorf("at last %d labels", len(was))
	}
}

// A guest that writes faster than its viewers read is not held up, and holds
// nobody up.
func TestConsoleWithSlowViewers(t *testing.T) {
	guest, conn := net.Pipe()
	c := &console{conn: conn, viewers: map[*Viewer]bool{}}
	var all sync.WaitGroup
	for range 4 {
		w := &Viewer{console: c, output: make(chan []byte, 1)}
		c.viewers[w] = true
		all.Go(func() { io.Copy(io.Discard, w) })
	}
	all.Go(c.copy)
	guest.SetDeadline(time.Now().Add(10 * time.Second))
	for range 50000 {
		if _, err := guest.Write([]byte("x")); err != nil {
			t.Fatalf("the console is stuck: %v", err)
		}
	}
	guest.Close()
	all.Wait()
}

// A disk that does not answer holds up those who write to it, and nobody else.
func TestStalledDisk(t *testing.T) {
	_, mnt := mountDisk(t, "ext4")
	h := New(Config{StateDir: mnt, Bridge: "br0", Log: slog.New(slog.DiscardHandler)})
	r := testRecord(h.root(), "there")
	if err := r.create(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.ctx, h.vms[r.Spec.UID] = ctx, newInstance(h, r)
	command(t, "fsfreeze", "--freeze", mnt)
	thaw := sync.OnceFunc(func() { command(t, "fsfreeze", "--unfreeze", mnt) })
	defer thaw()
	var writers sync.WaitGroup
	writers.Go(func() { h.Delete(r.Spec.UID) })
	writers.Go(func() {
		s := testRecord("", "new").Spec
		s.UID, s.Kernel.Path = "", "vmlinux"
		if _, err := h.create(ctx, s, ""); err != nil {
			t.Error(err)
		}
	})
	answered := make(chan int)
	go func() {
		for range 20 { // while they wait, whichever comes first
			time.Sleep(5 * time.Millisecond)
			h.List("", "")
		}
		_, err := h.Get(r.Spec.UID)
		if err != nil {
			t.Error(err)
		}
		answered <- len(h.List("", ""))
	}()
	select {
	case n := <-answered:
		if n != 1 {
			t.Errorf("%d microVMs, before the second is on disk", n)
		}
	case <-time.After(10 * time.Second):
		t.Error("a list waits for the disk")
	}
	cancel() // so that nothing is started
	thaw()
	writers.Wait()
	if n := len(h.List("", "")); n != 2 {
		t.Errorf("%d microVMs in the end", n)
	}
}

// A hypervisor without a way to the guest's agent, as flintlock has started them, is
// asked for it once: one that runs steadily has no timer.
func TestNoAgentNoTimer(t *testing.T) {
	v := testInstance(t)
	v.host.ctx = t.Context()
	m := &agentless{}
	v.machine = m
	for range 3 {
		v.hear()
	}
	if at := v.next(); m.asked != 1 || !at.IsZero() {
		t.Errorf("asked %d times, next at %v", m.asked, at)
	}
}

type agentless struct {
	vmm.Machine
	asked int
}

func (m *agentless) Agent(context.Context) (net.Conn, error) {
	m.asked++
	return nil, errdefs.ErrNotImplemented
}
