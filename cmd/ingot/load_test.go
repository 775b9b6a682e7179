package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

var (
	killRounds = flag.Int("kill.rounds", 200, "how many processes are killed under load")
	killSeed   = flag.Uint64("kill.seed", 1, "what the choice of them follows from")
)

// client makes, stops, starts and deletes one microVM after the other, and
// knows what it was promised.
type client struct {
	m      *testMachine
	name   string
	random *rand.Rand
	uid    string // empty: there is none
	phase  string // promised; empty: the last call was not answered
	calls  int
	made   []string
	// leaving is set once a delete was asked for and not answered.
	leaving bool
}

// TestKilledUnderLoad kills the daemon, containerd and hypervisors at random
// moments while clients are at work. What they were promised is so in the end,
// whatever was killed; nothing runs twice, and nothing is left.
func TestKilledUnderLoad(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	ctx, stop := context.WithCancel(t.Context())
	var clients []*client
	var all, watching sync.WaitGroup
	defer watching.Wait()
	watch, unwatch := context.WithCancel(t.Context())
	defer unwatch()
	w := m.watch(watch, t, &watching, &ingotv1.WatchRequest{})
	for i := range 6 {
		c := &client{m: m, name: fmt.Sprint("load-", i), random: rand.New(rand.NewPCG(*killSeed, uint64(i)))}
		clients = append(clients, c)
		all.Go(func() {
			for ctx.Err() == nil && !t.Failed() {
				c.step(t, ctx)
			}
		})
	}
	random := rand.New(rand.NewPCG(*killSeed, 1000))
	killed := map[string]int{}
	for range *killRounds {
		if t.Failed() {
			break
		}
		time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond)
		switch n := random.IntN(10); {
		case n < 6:
			killed["daemon"]++
			m.killDaemon()
			m.startDaemon(t)
		case n < 8:
			killed["containerd"]++
			m.containerd.Process.Kill()
			m.containerd.Wait()
			m.startContainerd(t)
		default:
			if pids := m.hypervisors(); len(pids) > 0 {
				killed["hypervisor"]++
				var pid int
				fmt.Sscan(pids[random.IntN(len(pids))], &pid)
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	stop()
	all.Wait()
	calls, want := 0, 0
	for _, c := range clients {
		calls += c.calls
		if c.uid != "" && c.phase != "" {
			m.await(t, c.uid, c.phase)
		}
	}
	t.Logf("killed %v under %d calls", killed, calls)
	for _, vm := range m.list(t) { // who was killed often may wait for a minute
		phase := ""
		await := func() bool {
			phase = m.phase(t, vm.Spec.GetUid())
			return phase == "running" || phase == "stopped" || phase == ""
		}
		for deadline := time.Now().Add(90 * time.Second); !await(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s does not settle: %v", vm.Spec.GetUid(), m.status(t, vm.Spec.GetUid()))
			}
		}
		if phase == "running" {
			want++
		}
	}
	if n := len(m.hypervisors()); n != want {
		t.Errorf("%d hypervisors for %d microVMs that run", n, want)
	}
	await(t, "the watch to see it", func() bool {
		for _, vm := range m.list(t) {
			if seen := w.of(vm.Spec.GetUid()); len(seen) == 0 || seen[len(seen)-1] != vm.Status.GetPhase() {
				return false
			}
		}
		return true
	})
	for _, vm := range m.list(t) {
		m.remove(t, vm.Spec.GetUid())
	}
	w.expectLives(t, clients)
	m.expectNothing(t)
}

// expectLives finds for each microVM that was made one beginning, one end, and nothing
// before or after that.
func (w *watcher) expectLives(t *testing.T, clients []*client) {
	t.Helper()
	made := map[string]bool{}
	for _, c := range clients {
		for _, uid := range c.made {
			made[uid] = true
		}
	}
	w.mu.Lock()
	for _, e := range w.seen {
		made[e.GetMicrovm().GetSpec().GetUid()] = true
	}
	w.mu.Unlock()
	for uid := range made {
		await(t, "the watch to see the end of "+uid, func() bool { seen := w.of(uid); return len(seen) > 0 && seen[len(seen)-1] == "deleted" })
		for i, word := range w.of(uid) {
			if first := i == 0; first != (word == "created") {
				t.Errorf("%s: %q", uid, w.of(uid))
				break
			}
		}
		if seen := w.of(uid); slices.Index(seen, "deleted") != len(seen)-1 {
			t.Errorf("%s: %q", uid, seen)
		}
	}
	t.Logf("%d events of %d microVMs were seen", len(w.seen), len(made))
}

// step makes one call, and looks whether the last promise was kept.
func (c *client) step(t *testing.T, ctx context.Context) {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	c.calls++
	if c.uid == "" {
		r, err := c.m.vms.CreateMicroVM(call, &v1alpha1.CreateMicroVMRequest{Microvm: spec(c.name)}, grpc.WaitForReady(true))
		if err == nil {
			c.uid, c.phase, c.leaving = r.Microvm.Spec.GetUid(), "running", false
			c.made = append(c.made, c.uid)
		} else {
			c.expectCut(t, "create", err)
		}
		return
	}
	var err error
	switch was := c.phase; c.random.IntN(4) {
	case 0:
		c.phase = ""
		if _, err = c.m.host.Stop(call, &ingotv1.StopRequest{Uid: c.uid}, grpc.WaitForReady(true)); err == nil {
			c.phase = "stopped"
		}
	case 1:
		c.phase = ""
		if _, err = c.m.host.Start(call, &ingotv1.StartRequest{Uid: c.uid}, grpc.WaitForReady(true)); err == nil {
			c.phase = "running"
		}
	case 2:
		c.phase, c.leaving = "", true
		if _, err = c.m.vms.DeleteMicroVM(call, &v1alpha1.DeleteMicroVMRequest{Uid: c.uid}, grpc.WaitForReady(true)); err == nil || notFound(err) {
			err = nil
			c.m.await(t, c.uid, "")
			c.uid = ""
		}
	default:
		if was != "" {
			c.m.await(t, c.uid, was)
		}
	}
	if err != nil && c.leaving && notFound(err) {
		c.uid = ""
	} else if err != nil && c.leaving && status.Code(err) == codes.FailedPrecondition {
		c.m.await(t, c.uid, "") // the delete was heard
		c.uid = ""
	} else if err != nil {
		c.expectCut(t, "call", err)
	}
}

func notFound(err error) bool {
	return status.Code(err) == codes.NotFound || strings.Contains(err.Error(), "not found")
}

// expectCut accepts that a call was cut off by the daemon's death, and no other error.
func (c *client) expectCut(t *testing.T, what string, err error) {
	if status.Code(err) != codes.Unavailable {
		t.Errorf("%s: %s: %v", c.name, what, err)
	}
}
