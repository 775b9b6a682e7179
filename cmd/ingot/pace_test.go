package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
)

// busy is how much longer things may take where other tests run, too, than the floors in
// docs/benchmarks.md.
const busy = 5

// pace measures what a client waits for beside many microVMs, one of which it is given,
// and the same of one write that is made durable.
func (m *testMachine) pace(t *testing.T, uid string) {
	t.Helper()
	m.creates(t, 100)
	for _, row := range []struct {
		what  string
		n     int
		floor time.Duration // of the median
		do    func(i int) time.Duration
	}{
		{"get", 1000, time.Millisecond, func(int) time.Duration {
			return timed(t, func() error {
				_, err := m.vms.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{Uid: uid})
				return err
			})
		}},
		{"list of all", 50, 50 * time.Millisecond, func(int) time.Duration {
			return timed(t, func() error {
				_, err := m.vms.ListMicroVMs(t.Context(), &v1alpha1.ListMicroVMsRequest{})
				return err
			})
		}},
		{"a change asked for, to its event", 100, 20 * time.Millisecond, m.changed(t, uid)},
	} {
		var all []time.Duration
		for i := range row.n {
			all = append(all, row.do(i))
		}
		if p, _ := tell(t, row.what, all); p > busy*row.floor {
			t.Errorf("%s: p50 %v, floor %v", row.what, p, row.floor)
		}
	}
	if p, _ := tell(t, "100 creates at once, accepted", m.atOnce(t, 100)); p > busy*100*time.Millisecond {
		t.Errorf("100 creates at once are accepted after %v", p)
	}
}

// tell logs how long something took.
func tell(t *testing.T, what string, all []time.Duration) (p50, p99 time.Duration) {
	t.Helper()
	slices.Sort(all)
	p50, p99 = centile(all, 50), centile(all, 99)
	t.Logf("%-40s p50 %v, p99 %v, n %d", what, p50, p99, len(all))
	return p50, p99
}

func timed(t *testing.T, do func() error) time.Duration {
	t.Helper()
	began := time.Now()
	if err := do(); err != nil {
		t.Error(err)
	}
	return time.Since(began)
}

// durable writes a file, and has it on disk.
func durable(t *testing.T, dir string) func(int) time.Duration {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 2048)
	return func(i int) time.Duration {
		return timed(t, func() error {
			f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
			if err != nil {
				return err
			}
			defer f.Close()
			if _, err := f.Write(data); err != nil {
				return err
			}
			return f.Sync()
		})
	}
}

// creates has microVMs made, each once the one before is gone, by turns with writes of
// a file: both wait for a disk that has other work, too.
func (m *testMachine) creates(t *testing.T, n int) {
	t.Helper()
	dir := filepath.Join(m.dir, "state", "durable")
	defer os.RemoveAll(dir)
	write := durable(t, dir)
	var written, accepted []time.Duration
	for i := range 2 * n {
		if i%2 == 0 {
			written = append(written, write(i))
		}
		var uid string
		took := timed(t, func() error {
			uid = m.create(t, fmt.Sprint("accepted-", i))
			return nil
		})
		if i%2 == 1 {
			accepted = append(accepted, took)
		}
		m.awaitRunning(t, uid)
		m.remove(t, uid)
	}
	_, one := tell(t, "one new file of 2 KB, durable", written)
	_, create := tell(t, "create accepted, durable, one client", accepted)
	t.Logf("%-40s %.1f", "its p99 over the other's", float64(create)/float64(one))
}

// changed changes labels, and hears of it by a watch.
func (m *testMachine) changed(t *testing.T, uid string) func(int) time.Duration {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := m.host.Watch(ctx, &ingotv1.WatchRequest{Uid: uid})
	if err != nil {
		t.Fatal(err)
	}
	return func(i int) time.Duration {
		label := strconv.Itoa(i)
		return timed(t, func() error {
			if _, err := m.host.Update(t.Context(), &ingotv1.UpdateRequest{Uid: uid, Labels: map[string]string{"pace": label}}); err != nil {
				return err
			}
			for {
				r, err := stream.Recv()
				if err != nil || r.GetMicrovm().GetSpec().GetLabels()["pace"] == label {
					return err
				}
			}
		})
	}
}

// atOnce has microVMs made at the same time, and says when each was accepted.
func (m *testMachine) atOnce(t *testing.T, n int) []time.Duration {
	t.Helper()
	took, uids := make([]time.Duration, n), make([]string, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			took[i] = timed(t, func() error {
				r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec(fmt.Sprint("at-once-", i))})
				uids[i] = r.GetMicrovm().GetSpec().GetUid()
				return err
			})
		})
	}
	all.Wait() // not until they run: a bridge has 1,024 ports
	for _, uid := range uids {
		m.remove(t, uid)
	}
	return took
}
