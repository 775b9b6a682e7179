package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

var many = flag.Int("many", 100, "how many microVMs TestMany has; the benchmark is of 1000")

// TestMany has many microVMs on one host, and measures what the daemon needs for
// them, how soon it hears of an end, and how soon a new daemon has found all.
func TestMany(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	none := m.usage(t)
	began := time.Now()
	uids := m.createMany(t, *many)
	t.Logf("%d microVMs run after %v", *many, time.Since(began).Round(time.Millisecond))
	all := m.usage(t)
	each := func(a, b int) float64 { return float64(b-a) / float64(*many) }
	t.Logf("the daemon: %d threads; a microVM: %.1f KiB of anonymous memory, %.2f descriptors",
		all.threads, each(none.memory, all.memory), each(none.files, all.files))
	if all.threads > 50 {
		t.Errorf("%d threads", all.threads)
	}

	delays := m.endAndHear(t, uids[:20])
	t.Logf("from a hypervisor's end to the client's hearing of it: p50 %v, p95 %v", delays[len(delays)/2], delays[len(delays)*95/100])
	if d := delays[len(delays)/2]; d > 100*time.Millisecond {
		t.Errorf("a hypervisor's end is heard after %v", d)
	}
	await(t, "all to run again", func() bool { return len(m.hypervisors()) == *many && m.running(t) == *many })

	m.pace(t, uids[len(uids)-1])

	m.killDaemon()
	before := m.found(t)
	began = time.Now()
	m.startDaemon(t)
	serving := time.Since(began)
	await(t, "all to be found", func() bool { return m.found(t)-before == *many })
	took := time.Since(began)
	t.Logf("a new daemon served after %v and had found %d microVMs after %v", serving.Round(time.Millisecond), *many, took.Round(time.Millisecond))
	if took > 5*time.Second {
		t.Errorf("found all after %v", took)
	}
	for _, uid := range uids {
		if _, err := m.vms.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: uid}); err != nil {
			t.Error(err)
		}
	}
	await(t, "all to be gone", func() bool { return len(m.list(t)) == 0 })
	m.expectNothing(t)
}

// createMany makes microVMs, some at a time, and returns when all run.
func (m *testMachine) createMany(t *testing.T, count int) []string {
	t.Helper()
	uids := make([]string, count)
	var all sync.WaitGroup
	const atOnce = 8
	for i := range atOnce {
		all.Go(func() {
			for n := i; n < count; n += atOnce {
				uids[n] = m.create(t, fmt.Sprint("many-", n))
				m.awaitRunning(t, uids[n])
			}
		})
	}
	all.Wait()
	return uids
}

// awaitRunning waits by a watch.
func (m *testMachine) awaitRunning(t *testing.T, uid string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := m.host.Watch(ctx, &ingotv1.WatchRequest{Uid: uid}, grpc.WaitForReady(true))
	for err == nil {
		var r *ingotv1.WatchResponse
		if r, err = stream.Recv(); err == nil && r.Microvm.Status.GetAgentReady() {
			return
		}
	}
	t.Errorf("watch %s: %v", uid, err)
}

func (m *testMachine) running(t *testing.T) (count int) {
	for _, vm := range m.list(t) {
		if vm.Status.GetPhase() == "running" {
			count++
		}
	}
	return count
}

// found is how often a daemon has said that it found a microVM running.
func (m *testMachine) found(t *testing.T) int {
	t.Helper()
	log, err := os.ReadFile(m.dir + "/daemon.log")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(log, []byte("found running"))
}

// endAndHear kills hypervisors, and measures when a watch says so.
func (m *testMachine) endAndHear(t *testing.T, uids []string) (delays []time.Duration) {
	t.Helper()
	for _, uid := range uids {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		stream, err := m.host.Watch(ctx, &ingotv1.WatchRequest{Uid: uid})
		if err != nil {
			t.Fatal(err)
		}
		var began time.Time
		for {
			r, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if began.IsZero() {
				began = time.Now()
				if err := syscall.Kill(int(r.Microvm.Status.GetPid()), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			} else if r.Microvm.Status.GetPhase() != "running" {
				delays = append(delays, time.Since(began))
				break
			}
		}
		cancel()
	}
	slices.Sort(delays)
	return delays
}

type usage struct{ memory, threads, files int } // KiB of anonymous memory

func (m *testMachine) usage(t *testing.T) (u usage) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", m.daemon.Process.Pid)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		number := func() int {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		switch name {
		case "RssAnon":
			u.memory = number()
		case "Threads":
			u.threads = number()
		}
	}
	files, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	u.files = len(files)
	return u
}
