package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of x86-64 (linux/kvm.h).
const (
	getVCPUMapSize    = 0xAE04
	getSupportedCPUID = 0xC008AE05
	createVCPU        = 0xAE41
	setMemory         = 0x4020AE46
	setTSSAddress     = 0xAE47
	runVCPU           = 0xAE80
	setRegisters      = 0x4090AE82
	getSpecial        = 0x8138AE83
	setSpecial        = 0x4138AE84
	setCPUID          = 0x4008AE90
	getTSCkHz         = 0xAEA3
)

// Where KVM says why the guest stopped, in the memory that it shares (struct kvm_run).
const (
	immediateExit = 1
	exitReason    = 8
	exitDetail    = 32 // of input and output: direction, size, port, …; of an internal error: which
	dataOffset    = 40

	exitIO            = 2
	exitHalt          = 5
	exitInternalError = 17
)

type registers struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags uint64
}

type segment struct {
	base                                                  uint64
	limit                                                 uint32
	selector                                              uint16
	kind, present, dpl, db, s, l, g, available, unused, _ uint8
}

type table struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type special struct {
	cs, ds, es, fs, gs, ss, tr, ldt     segment
	gdt, idt                            table
	cr0, cr2, cr3, cr4, cr8, efer, apic uint64
	interrupts                          [4]uint64
}

type memoryRegion struct {
	slot, flags          uint32
	guest, size, address uint64
}

// vcpu is the guest, ready to run.
type vcpu struct {
	fd     int
	shared []byte
	tscKHz int
	undo   []func()
}

func (c *vcpu) close() {
	for i := len(c.undo) - 1; i >= 0; i-- {
		c.undo[i]()
	}
}

// probe makes the guest, runs it, and takes it away.
func probe() (v Verdict) {
	c := new(vcpu)
	defer c.close()
	err := c.make()
	v.TSCkHz = c.tscKHz
	if v.TSCkHz == 0 {
		v.TSCkHz = measuredTSC()
	}
	if err != nil {
		v.Err = err
		return v
	}
	c.run(&v, budget)
	return v
}

func (c *vcpu) make() error {
	f, machine, err := open(device)
	if err != nil {
		return err
	}
	c.undo = append(c.undo, func() { f.Close() }, func() { unix.Close(machine) })
	// Intel CPUs without "unrestricted guest" want it; its failure elsewhere says nothing.
	call(machine, setTSSAddress, 0xfffbd000)
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map the guest's memory: %w", err)
	}
	c.undo = append(c.undo, func() { unix.Munmap(memory) })
	if err := lay(memory); err != nil {
		return err
	}
	region := memoryRegion{size: memorySize, address: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := call(machine, setMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("give the guest memory: %w", err)
	}
	if c.fd, err = call(machine, createVCPU, 0); err != nil {
		return fmt.Errorf("make a CPU: %w", err)
	}
	c.undo = append(c.undo, func() { unix.Close(c.fd) })
	if khz, err := call(c.fd, getTSCkHz, 0); err == nil {
		c.tscKHz = khz
	}
	size, err := call(int(f.Fd()), getVCPUMapSize, 0)
	if err != nil {
		return fmt.Errorf("ask for the size of a CPU's state: %w", err)
	}
	if c.shared, err = unix.Mmap(c.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map a CPU's state: %w", err)
	}
	c.undo = append(c.undo, func() { unix.Munmap(c.shared) })
	return c.prepare(f)
}

// prepare gives the CPU the host's features, and puts it into 64-bit mode at the
// guest's entry.
func (c *vcpu) prepare(kvm *os.File) error {
	const entries, entrySize = 256, 40
	features := make([]byte, 8+entries*entrySize)
	binary.LittleEndian.PutUint32(features, entries)
	if _, err := call(int(kvm.Fd()), getSupportedCPUID, uintptr(unsafe.Pointer(&features[0]))); err != nil {
		return fmt.Errorf("ask for the features of a CPU: %w", err)
	}
	if _, err := call(c.fd, setCPUID, uintptr(unsafe.Pointer(&features[0]))); err != nil {
		return fmt.Errorf("set the features of a CPU: %w", err)
	}
	var s special
	if _, err := call(c.fd, getSpecial, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("read the CPU's registers: %w", err)
	}
	const (
		executable, writable                  = 11, 3
		paged, protected                      = 0x80000000, 0x50033
		physicalExtension, fxsave, simdErrors = 1 << 5, 1 << 9, 1 << 10
		longEnabled, longActive, noExecute    = 1 << 8, 1 << 10, 1 << 11
	)
	s.cs = segment{limit: 0xffffffff, selector: codeSelector, kind: executable, present: 1, s: 1, l: 1, g: 1}
	data := segment{limit: 0xffffffff, selector: dataSelector, kind: writable, present: 1, db: 1, s: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	s.gdt = table{base: gdt, limit: 7*8 - 1}
	s.cr0, s.cr3, s.cr4 = paged|protected, pageTable, physicalExtension|fxsave|simdErrors
	s.efer = longEnabled | longActive | noExecute
	if _, err := call(c.fd, setSpecial, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("set the CPU's mode: %w", err)
	}
	r := registers{rip: upper + entry, rsp: upper + stack, rflags: 2}
	if _, err := call(c.fd, setRegisters, uintptr(unsafe.Pointer(&r))); err != nil {
		return fmt.Errorf("set the CPU's registers: %w", err)
	}
	return nil
}

// run runs the guest until it halts, fails, or has used up its time.
func (c *vcpu) run(v *Verdict, budget time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var expired atomic.Bool
	defer c.watch(budget, &expired)() // before the shared memory is unmapped
	start := time.Now()
	defer func() { v.Elapsed = time.Since(start) }()
	for {
		_, err := call(c.fd, runVCPU, 0)
		interrupted := errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN)
		switch {
		case interrupted && expired.Load():
			v.Exit, v.Err = exitTimeout, fmt.Errorf("a guest that needs 5 ms was not done in %v", budget)
			return
		case interrupted:
			continue
		case err != nil:
			v.Err = fmt.Errorf("run the guest: %w", err)
			return
		}
		if c.stopped(v) {
			return
		}
	}
}

// stopped looks why the guest stopped, and says whether that was its end.
func (c *vcpu) stopped(v *Verdict) bool {
	switch reason := binary.LittleEndian.Uint32(c.shared[exitReason:]); reason {
	case exitIO:
		const out = 1
		if c.shared[exitDetail] == out && binary.LittleEndian.Uint16(c.shared[exitDetail+2:]) == port {
			v.Stage += string(c.shared[binary.LittleEndian.Uint64(c.shared[dataOffset:])])
		}
		if len(v.Stage) <= len(allSteps) {
			return false
		}
		v.Exit, v.Err = "IO", errors.New("the guest does what it was not told")
	case exitHalt:
		v.Exit, v.Usable = "HLT", v.Stage == allSteps
		if !v.Usable {
			v.Err = errors.New("the guest gave up half way")
		}
	case exitInternalError:
		v.Exit = fmt.Sprintf("INTERNAL_ERROR/%d", binary.LittleEndian.Uint32(c.shared[exitDetail:]))
		v.Err = errors.New("it interprets instructions instead of running them on the CPU")
	default:
		v.Exit, v.Err = fmt.Sprintf("EXIT_%d", reason), errors.New("the guest stopped unexpectedly")
	}
	return true
}

// watch interrupts this thread when the time is up: it asks KVM to leave the
// guest, and sends SIGURG, which Go's runtime uses itself and takes for nothing,
// until somebody ends the watch.
func (c *vcpu) watch(budget time.Duration, expired *atomic.Bool) (end func()) {
	thread, process := unix.Gettid(), os.Getpid()
	done := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for wait := budget; ; wait = 5 * time.Millisecond {
			select {
			case <-done:
				return
			case <-time.After(wait):
				expired.Store(true)
				c.shared[immediateExit] = 1
				unix.Tgkill(process, thread, unix.SIGURG)
			}
		}
	})
	return func() { close(done); watcher.Wait() }
}
