package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
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
	var all sync.WaitGroup
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
	await(t, "all to settle", func() bool {
		want = 0
		for _, vm := range m.list(t) {
			switch vm.Status.GetPhase() {
			case "running":
				want++
			case "stopped":
			default:
				return false
			}
		}
		return true
	})
	if n := len(m.hypervisors()); n != want {
		t.Errorf("%d hypervisors for %d microVMs that run", n, want)
	}
	for _, vm := range m.list(t) {
		m.remove(t, vm.Spec.GetUid())
	}
	m.expectNothing(t)
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
