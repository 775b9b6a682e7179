package host

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vm"
)

// Limits say how much of the machine is promised to microVMs at most. 0 is no limit.
type Limits struct {
	MicroVMs         int
	VCPUOvercommit   float64 // guests' CPUs to one of the machine's
	MemoryOvercommit float64 // guests' memory to the machine's, without what is reserved
	ReservedMemory   vm.MiB  // for the machine itself
}

// Promised is what microVMs have been promised, or may be at most; then 0 is no limit.
type Promised struct {
	MicroVMs, VCPUs int
	Memory          vm.MiB
}

// of is what they are of this machine.
func (l Limits) of(memory vm.MiB, cpus int) Promised {
	most := Promised{MicroVMs: l.MicroVMs, VCPUs: int(l.VCPUOvercommit * float64(cpus))}
	if l.MemoryOvercommit > 0 {
		most.Memory = max(1, vm.MiB(l.MemoryOvercommit*float64(memory-l.ReservedMemory)))
	}
	return most
}

// machineMemory is what this machine has; 0 if it does not say.
func machineMemory() vm.MiB {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return vm.MiB(int64(info.Totalram) * int64(info.Unit) >> 20)
}

// ledger has what each microVM is promised that runs or is to run. Nothing is asked
// again of one that has its promise: a limit that is lowered, and a daemon that is
// restarted, end nobody.
type ledger struct {
	most Promised

	mu  sync.Mutex // guards what follows; comes last
	by  map[string]Promised
	sum Promised
}

func newLedger(l Limits) *ledger {
	return &ledger{most: l.of(machineMemory(), runtime.NumCPU()), by: map[string]Promised{}}
}

// take promises a microVM what its spec says, or says what of that there is no room for.
func (l *ledger) take(s vm.Spec) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, has := l.by[s.UID]; has {
		return nil
	}
	if err := errors.Join(
		exceeds("vcpu", " CPUs", "vcpu-overcommit", int64(s.VCPU), int64(l.sum.VCPUs), int64(l.most.VCPUs)),
		exceeds("memory_in_mb", " MiB", "memory-overcommit, reserved-memory", int64(s.Memory), int64(l.sum.Memory), int64(l.most.Memory)),
		exceeds("microvm", " microVM", "max-microvms", 1, int64(l.sum.MicroVMs), int64(l.most.MicroVMs)),
	); err != nil {
		return fmt.Errorf("%w: stop or delete some, or choose another host: %w", err, errdefs.ErrResourceExhausted)
	}
	l.put(s)
	return nil
}

func exceeds(field, unit, keys string, asked, promised, limit int64) error {
	if limit == 0 || promised+asked <= limit {
		return nil
	}
	return fmt.Errorf("%s: %d%s asked for, and %d of %d are promised to microVMs of this host (%s)", field, asked, unit, promised, limit, keys)
}

// hold notes what a microVM has, whatever the limits are.
func (l *ledger) hold(s vm.Spec) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, has := l.by[s.UID]; !has {
		l.put(s)
	}
}

// put adds to the sum. The caller holds l.mu.
func (l *ledger) put(s vm.Spec) {
	p := Promised{1, s.VCPU, s.Memory}
	l.by[s.UID] = p
	l.sum = Promised{l.sum.MicroVMs + 1, l.sum.VCPUs + p.VCPUs, l.sum.Memory + p.Memory}
}

// give takes the promise back, if there is one.
func (l *ledger) give(uid string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.by[uid]
	delete(l.by, uid)
	l.sum = Promised{l.sum.MicroVMs - p.MicroVMs, l.sum.VCPUs - p.VCPUs, l.sum.Memory - p.Memory}
}

// Promised is what is promised to microVMs that run or are to run, and what may be at
// most.
func (h *Host) Promised() (now, most Promised) {
	h.ledger.mu.Lock()
	defer h.ledger.mu.Unlock()
	return h.ledger.sum, h.ledger.most
}

// wantRun is want for what has a microVM run again: it is let in as a new one is.
func (v *instance) wantRun(change func(*record) error) error {
	if err := v.admit(); err != nil {
		return err
	}
	defer v.admitted()
	return v.want(change)
}

func (v *instance) admit() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.gone || v.record.Deleting { // and want says so
		return nil
	}
	if err := v.host.ledger.take(v.spec); err != nil {
		return fmt.Errorf("start microVM %s: %w", v.spec.Name, err)
	}
	v.admitting++
	return nil
}

func (v *instance) admitted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.admitting = max(0, v.admitting-1)
	v.settle()
}

// settle gives back what was promised to a microVM that neither runs nor is to run. The
// caller holds v.mu.
func (v *instance) settle() {
	if v.admitting == 0 && v.idle() {
		v.host.ledger.give(v.spec.UID)
	}
}

// idle says whether it neither runs nor is to run. The caller holds v.mu.
func (v *instance) idle() bool {
	switch v.status.Phase {
	case vm.Stopped:
		return v.record.Stopped && !v.record.Again
	case vm.Failed:
		return !v.record.Again
	}
	return false
}
