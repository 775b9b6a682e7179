package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
	"ingot/internal/vm"
)

// Usage is what a microVM uses, as far as this machine sees it.
type Usage struct {
	View
	// Process is its hypervisor, nil if none runs.
	Process *ProcessUsage
	Disks   []DiskUsage
	Links   []LinkUsage
}

// ProcessUsage is what a process uses, or has used so far.
type ProcessUsage struct {
	CPU      time.Duration
	Resident int64 // bytes
	// Read and Written are bytes that storage was asked for: what the page cache had is
	// none of it. They are negative if the kernel does not count them.
	Read, Written int64
}

// DiskUsage is a volume.
type DiskUsage struct {
	ID   string
	Size int64 // bytes
	// Allocated are the bytes that it takes in the pool, those among them that it shares
	// with its image and others.
	Allocated int64
}

// LinkUsage is what an interface has carried, as the guest sees it.
type LinkUsage struct {
	ID string
	link.Traffic
}

// Usage measures all microVMs, some at a time, when it is asked, and nobody else is
// kept waiting for it. Those that are not measured when ctx ends are left out.
func (h *Host) Usage(ctx context.Context) ([]Usage, error) {
	traffic, err := link.ReadTraffic()
	all := h.all()
	found := make([]Usage, len(all))
	var next atomic.Int64
	var measuring sync.WaitGroup
	for range runtime.NumCPU() {
		measuring.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(all) {
					return
				}
				found[i] = all[i].usage(traffic)
			}
		})
	}
	measuring.Wait()
	if left := len(all) - min(int(next.Load()), len(all)); left > 0 {
		err = errors.Join(err, fmt.Errorf("measure microVMs: there was no time for %d of %d: %w", left, len(all), context.Cause(ctx)))
		found = found[:len(all)-left]
	}
	return found, err
}

func (v *instance) usage(traffic map[int]link.Traffic) Usage {
	v.mu.Lock()
	u, m := Usage{View: v.viewLocked()}, v.machine
	v.mu.Unlock()
	if m != nil {
		p, err := measureProcess(m.PID())
		select {
		case <-m.Done(): // the number may be another's by now
		default:
			if err == nil {
				u.Process = &p
			}
		}
	}
	for _, volume := range append([]vm.Volume{u.Spec.Root}, u.Spec.Volumes...) {
		var stat unix.Stat_t
		if path := u.Status.Volumes[volume.ID]; path != "" && unix.Stat(path, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFREG {
			u.Disks = append(u.Disks, DiskUsage{ID: volume.ID, Size: stat.Size, Allocated: stat.Blocks * 512})
		}
	}
	for _, n := range u.Spec.Interfaces {
		t, ok := traffic[u.Status.Links[n.ID].Index]
		if !ok {
			continue
		}
		if n.Kind == vm.Tap { // what the guest sends, this machine receives; a macvtap is the guest's own card
			t.ReceivedBytes, t.SentBytes = t.SentBytes, t.ReceivedBytes
			t.ReceivedPackets, t.SentPackets = t.SentPackets, t.ReceivedPackets
		}
		u.Links = append(u.Links, LinkUsage{ID: n.ID, Traffic: t})
	}
	return u
}

// measureProcess reads proc_pid_stat(5) and proc_pid_io(5): two files, so that a
// thousand processes are measured in some 20 ms.
func measureProcess(pid int) (u ProcessUsage, err error) {
	buffer := make([]byte, 4096)
	stat, err := readProc(buffer, pid, "stat")
	if err != nil {
		return u, err
	}
	const utime, stime, rss, perSecond = 11, 12, 21, 100 // fields after the name; USER_HZ
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= rss {
		return u, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	number := func(text []byte) int64 {
		n, _ := strconv.ParseInt(string(text), 10, 64)
		return n
	}
	u.CPU = time.Duration(number(fields[utime])+number(fields[stime])) * time.Second / perSecond
	u.Resident = number(fields[rss]) * int64(os.Getpagesize())
	u.Read, u.Written = -1, -1
	io, err := readProc(buffer, pid, "io")
	if err != nil {
		return u, nil
	}
	for line := range bytes.Lines(io) {
		key, value, _ := bytes.Cut(line, []byte(": "))
		switch string(key) {
		case "read_bytes":
			u.Read = number(bytes.TrimSpace(value))
		case "write_bytes":
			u.Written = number(bytes.TrimSpace(value))
		}
	}
	return u, nil
}

// readProc reads a small file without the calls that other files take.
func readProc(buffer []byte, pid int, name string) ([]byte, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, buffer)
	return buffer[:max(n, 0)], err
}

// measure notes what the hypervisor uses.
func (v *instance) measure() {
	v.mu.Lock()
	m := v.machine
	v.mu.Unlock()
	if m == nil {
		return
	}
	if _, err := m.Metrics(v.host.ctx); err != nil {
		v.log.Debug("measure the hypervisor", "err", err)
	}
}

// Turns says how many guests boot now, and how many may at the same time.
func (h *Host) Turns() (taken, most int) { return len(h.turns), cap(h.turns) }

// EventsWritten are how many events this daemon has written, by their kind.
func (h *Host) EventsWritten() map[EventKind]int {
	h.events.mu.Lock()
	defer h.events.mu.Unlock()
	counts := map[EventKind]int{Created: 0, Changed: 0, Deleted: 0}
	for kind, n := range h.events.counts {
		counts[kind] = n
	}
	return counts
}
