package web

import (
	"context"
	"errors"
	"math"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/host"
	"ingot/internal/pool"
	"ingot/internal/vm"
)

// What is told of the host.
var (
	microvms    = gauge("ingot_microvms", "MicroVMs by the phase that they are in.")
	queue       = gauge("ingot_queue_depth", "MicroVMs that wait: for an image to be pulled or unpacked, for a turn to boot, for the hypervisor to start, or for the next try after one that failed.")
	turns       = gauge("ingot_boot_turns", "Guests that may boot at the same time.")
	turnsTaken  = gauge("ingot_boot_turns_taken", "Guests that boot now.")
	pulls       = gauge("ingot_image_pulls", "Images that are being pulled or unpacked.")
	pullsQueued = gauge("ingot_image_pulls_queued", "Images that wait until others are pulled or unpacked.")
	pullWaiters = gauge("ingot_image_pull_waiters", "MicroVMs and clients that wait for the images that are being pulled.")
	events      = total("ingot_events_written_total", "Events that this daemon has written to the journal.")
	broken      = gauge("ingot_broken_records", "Records of microVMs that can't be read.")
	committed   = gauge("ingot_microvms_committed", "MicroVMs that run or are to.")
	limit       = gauge("ingot_microvms_limit", "How many may run or be to.")
	vcpus       = gauge("ingot_vcpus", "CPUs of this machine.")
	vcpusUsed   = gauge("ingot_vcpus_committed", "Virtual CPUs promised to the microVMs that run or are to.")
	vcpusMost   = gauge("ingot_vcpus_limit", "Virtual CPUs that may be promised.")
	memory      = gauge("ingot_memory_bytes", "Memory of this machine.")
	memoryUsed  = gauge("ingot_memory_committed_bytes", "Memory promised to the microVMs that run or are to.")
	memoryMost  = gauge("ingot_memory_limit_bytes", "Memory that may be promised.")
	poolUp      = gauge("ingot_pool_up", "Whether the volumes' pool can be read.")
	poolSize    = gauge("ingot_pool_size_bytes", "Size of the volumes' pool.")
	poolUsed    = gauge("ingot_pool_used_bytes", "What is used of the volumes' pool.")
	poolRoom    = gauge("ingot_pool_available_bytes", "What can still be written to the volumes' pool: the file system beneath may be full first.")
	poolInodes  = gauge("ingot_pool_free_inodes", "Files that can still be made in the volumes' pool.")
	incomplete  = gauge("ingot_scrape_incomplete", "Whether there was no time to measure all microVMs, or the network's counters could not be read.")
	measured    = gauge("ingot_scrape_measuring_seconds", "Time that it took to measure the microVMs for this scrape.")
)

// The values of labels that are always there.
var (
	queues = []string{"pull", "turn", "boot", "retry"}
	phases = []vm.Phase{vm.Pending, vm.Starting, vm.Running, vm.Paused, vm.Stopping, vm.Stopped, vm.Failed, vm.Deleting}
	kinds  = []host.EventKind{host.Created, host.Changed, host.Deleted}
)

// survey measures the host, its queues, its pool and its microVMs, until ctx ends. What
// it could measure is told of whatever the error is.
func (s Source) survey(ctx context.Context) (families, error) {
	f := families{}
	began := time.Now()
	usage, err := s.Host.Usage(ctx)
	f.add(measured, time.Since(began).Seconds())
	f.add(incomplete, map[bool]float64{true: 1}[err != nil])
	for _, u := range usage {
		f.microVM(u)
	}
	s.states(f, usage)
	s.waiting(f, usage)
	return f, errors.Join(err, s.capacity(f))
}

func (s Source) states(f families, usage []host.Usage) {
	numbers := map[vm.Phase]int{}
	for _, u := range usage {
		numbers[u.Status.Phase]++
	}
	count(f, microvms, "phase", phases, numbers)
	count(f, events, "kind", kinds, s.Host.EventsWritten())
	f.add(broken, float64(len(s.Host.Broken())))
}

func (s Source) waiting(f families, usage []host.Usage) {
	now, numbers := time.Now(), map[string]int{}
	for _, u := range usage {
		switch st := u.Status; {
		case st.RetryAt.After(now):
			numbers["retry"]++
		case st.Phase == vm.Starting:
			numbers["boot"]++
		case st.Phase == vm.Pending && st.Step == "turn":
			numbers["turn"]++
		case st.Phase == vm.Pending && st.Step != "" && st.Step != "network": // how far the pull is
			numbers["pull"]++
		}
	}
	count(f, queue, "queue", queues, numbers)
	taken, most := s.Host.Turns()
	f.add(turns, float64(most))
	f.add(turnsTaken, float64(taken))
	running, queued, waiting := s.Images.Pulling()
	f.add(pulls, float64(running))
	f.add(pullsQueued, float64(queued))
	f.add(pullWaiters, float64(waiting))
}

func (s Source) capacity(f families) error {
	now, most := s.Host.Promised()
	f.add(committed, float64(now.MicroVMs))
	f.add(vcpusUsed, float64(now.VCPUs))
	f.add(memoryUsed, float64(now.Memory.Bytes()))
	for m, limit := range map[*measure]float64{limit: float64(most.MicroVMs), vcpusMost: float64(most.VCPUs), memoryMost: float64(most.Memory.Bytes())} {
		if limit != 0 { // or there is none
			f.add(m, limit)
		}
	}
	f.add(vcpus, float64(runtime.NumCPU()))
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		f.add(memory, float64(info.Totalram)*float64(info.Unit))
	}
	p, err := pool.ReadFacts(s.Pool)
	f.add(poolUp, map[bool]float64{true: 1}[err == nil])
	if err != nil {
		return err
	}
	f.add(poolSize, float64(p.Size))
	f.add(poolUsed, float64(p.Used))
	f.add(poolRoom, float64(p.Available))
	if p.Inodes != math.MaxInt64 { // or there is no such number
		f.add(poolInodes, float64(p.Inodes))
	}
	return nil
}
