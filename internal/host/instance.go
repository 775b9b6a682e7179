package host

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/agent"
	"ingot/internal/metadata"
	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// Back-off between tries, and how long a microVM must run for it to begin anew.
const (
	firstDelay = time.Second
	lastDelay  = time.Minute
	steady     = time.Minute
	// unavailableDelay is the longest wait for containerd.
	unavailableDelay = 5 * time.Second
	// defaultPatience is how long a guest may take to shut down.
	defaultPatience = 30 * time.Second
	// hopeless is how many tries an error gets that a registry may still mend.
	hopeless = 3
)

const leasePrefix = "flintlock/"

// instance is one microVM. Its goroutine owns what runs; others read and change
// what is wanted.
type instance struct {
	host *Host
	log  *slog.Logger
	wake chan struct{}
	spec vm.Spec // as it was created: only its volumes' sizes change, in the record; these three never do
	dir  string
	user int

	// Of the goroutine.
	metadata *metadata.Server
	looked   bool // for what an earlier daemon has started

	mu        sync.Mutex  // guards what follows
	machine   vmm.Machine // only the goroutine changes it
	record    record
	status    vm.Status
	patience  time.Duration
	interrupt context.CancelFunc // ends the try in progress
	watchers  map[chan View]bool
	agent     *agent.Client
	console   *console
	gone      bool
}

func newInstance(h *Host, r record) *instance {
	return &instance{
		host: h, spec: r.Spec, dir: r.Dir, user: r.User, record: r, status: readStatus(r.Dir), wake: make(chan struct{}, 1), watchers: map[chan View]bool{},
		patience: defaultPatience,
		log:      h.c.Log.With("vm", r.Spec.Namespace+"/"+r.Spec.Name, "uid", r.Spec.UID),
	}
}

// lease is the name under which containerd keeps what this microVM uses.
func (v *instance) lease() string {
	s := v.spec
	return leasePrefix + s.Namespace + "/" + s.Name + "/" + s.UID
}

// device is the name of an interface's tap. It follows from the uid, so that a
// crash between making a tap and noting it loses nothing.
func device(uid string, n vm.Interface) string {
	sum := sha256.Sum256([]byte(uid + "/" + n.ID))
	prefix := "fltap"
	if n.Kind == vm.Macvtap {
		prefix = "flvtap"
	}
	return prefix + fmt.Sprintf("%x", sum)[:7]
}

func (v *instance) view() View {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.viewLocked()
}

func (v *instance) viewLocked() View {
	w := View{Spec: v.record.Spec, Status: v.status, Dir: v.dir}
	if v.record.Deleting {
		w.Status.Phase = vm.Deleting
	}
	return w
}

// want changes what is wanted of the microVM, on disk, and tells its goroutine.
func (v *instance) want(change func(*record) error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.gone {
		return fmt.Errorf("microvm spec %s not found%w", v.spec.UID, silent{errdefs.ErrNotFound})
	}
	was, next := v.record, v.record
	if err := change(&next); err != nil {
		return err
	}
	if next.Stopped == was.Stopped && next.Deleting == was.Deleting && v.status.Phase != vm.Failed {
		return nil
	}
	if err := next.save(); err != nil {
		return fmt.Errorf("record what is wanted of %s: %w", was.Spec.Name, err)
	}
	v.record = next
	v.status.Retry, v.status.RetryAt = 0, time.Time{}
	if v.status.Phase == vm.Failed && !next.Stopped {
		v.status.Phase, v.status.Reason = vm.Pending, ""
	}
	if v.interrupt != nil && (next.Stopped || next.Deleting) {
		v.interrupt()
	}
	v.tell()
	v.poke()
	return nil
}

func (v *instance) poke() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

// setPatience is how long the guest may take to shut down, also one that has been
// told to already.
func (v *instance) setPatience(d time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.patience = d
	if v.status.Phase == vm.Stopping && v.interrupt != nil {
		time.AfterFunc(d, v.interrupt)
	}
}

// set changes the status, notes it, and tells those who watch.
func (v *instance) set(change func(*vm.Status)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	was := v.status
	change(&v.status)
	if !reflect.DeepEqual(v.status, was) { // a new daemon finds most as it was
		v.tell()
	}
}

// tell writes the status down and sends it around. The caller holds v.mu.
func (v *instance) tell() {
	v.status.Version++
	if b, err := json.MarshalIndent(v.status, "", "  "); err == nil {
		if err := replace(filepath.Join(v.dir, statusName), b, false); err != nil {
			v.log.Warn("write status", "err", err)
		}
	}
	w := v.viewLocked()
	for ch := range v.watchers {
		select {
		case <-ch: // what was not read is old now
		default:
		}
		ch <- w
	}
}

func (v *instance) subscribe() (<-chan View, func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	ch := make(chan View, 1)
	if v.gone {
		close(ch)
		return ch, func() {}
	}
	ch <- v.viewLocked()
	v.watchers[ch] = true
	return ch, func() {
		v.mu.Lock()
		delete(v.watchers, ch)
		v.mu.Unlock()
	}
}

// finish tells those who watch that the microVM is gone.
func (v *instance) finish() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.gone = true
	for ch := range v.watchers {
		close(ch)
	}
	v.watchers = map[chan View]bool{}
}

// run keeps the microVM until ctx ends, or until it is deleted.
func (v *instance) run(ctx context.Context) (deleted bool) {
	defer v.letGo()
	for ctx.Err() == nil {
		v.look(ctx)
		if v.act(ctx) {
			return true
		}
		var ended <-chan struct{}
		if v.machine != nil {
			ended = v.machine.Done()
		}
		var again <-chan time.Time
		if at := v.view().Status.RetryAt; !at.IsZero() {
			again = time.After(time.Until(at))
		}
		select {
		case <-ctx.Done():
		case <-v.wake:
		case <-ended:
		case <-again:
			v.set(func(s *vm.Status) { s.RetryAt = time.Time{} })
		}
	}
	return false
}

// letGo leaves the microVM to the next daemon.
func (v *instance) letGo() {
	v.dropAgent()
	if v.machine != nil {
		v.machine.Close()
	}
	if v.metadata != nil {
		v.metadata.Close()
	}
}

// drop lets go of a hypervisor, and of the guest's agent and console.
func (v *instance) drop() {
	v.dropAgent()
	v.machine.Close()
	v.mu.Lock()
	v.machine = nil
	v.mu.Unlock()
}

// look finds out whether the hypervisor runs, and how it ended if it did.
func (v *instance) look(ctx context.Context) {
	if v.machine == nil && !v.looked {
		v.looked = true
		v.find(ctx)
		return
	}
	if v.machine == nil {
		return
	}
	select {
	case <-v.machine.Done():
		exit := v.machine.Exit()
		v.drop()
		v.ended(exit)
	default:
	}
}

// find takes over what an earlier daemon has started.
func (v *instance) find(ctx context.Context) {
	w := v.view()
	for _, d := range v.host.c.Drivers {
		if w.Status.Driver != d.Name() {
			continue
		}
		m, err := d.Attach(ctx, w.Dir)
		var ended *vmm.Ended
		switch {
		case err == nil:
			v.log.Info("found running", "pid", m.PID())
			v.running(m)
			for _, n := range v.spec.Interfaces { // also of a daemon that guarded none
				if err := v.guard(n); err != nil {
					v.log.Error("guard interface", "err", err)
				}
			}
			if err := v.host.logs.Add(v.dir); err != nil {
				v.log.Error("bound logs", "err", err)
			}
			if err := v.serveMetadata(ctx); err != nil {
				v.log.Error("serve metadata", "err", err)
			}
		case errors.As(err, &ended) && w.Status.Phase == vm.Running:
			v.ended(ended.Exit)
		case errdefs.IsNotFound(err):
			if w.Status.Phase == vm.Running {
				v.ended(vmm.Exit{Cause: vmm.Unknown, Detail: "it ended while the daemon was away", At: time.Now()})
			}
		default:
			v.log.Warn("look for an earlier hypervisor", "err", err)
			v.looked = false
			v.set(func(s *vm.Status) { s.Reason, s.RetryAt = err.Error(), time.Now().Add(firstDelay) })
		}
	}
}

// ended decides what follows from a hypervisor's end.
func (v *instance) ended(exit vmm.Exit) {
	w := v.view()
	policy := w.Spec.Restart
	reason := string(exit.Cause)
	if exit.Detail != "" {
		reason += ": " + exit.Detail
	}
	stop := false
	crashed := false
	switch exit.Cause {
	case vmm.PowerOff:
		stop = true
	case vmm.Stopped:
	case vmm.Reboot:
		stop = policy != vm.RestartAlways
	default:
		crashed = true
		stop = policy == vm.RestartNever
	}
	v.log.Info("microVM ended", "cause", exit.Cause, "detail", exit.Detail)
	if stop {
		// It is recorded, so that the next daemon does not start it either.
		v.mu.Lock()
		v.record.Stopped = true
		if err := v.record.save(); err != nil {
			v.log.Error("record that it has stopped", "err", err)
		}
		v.mu.Unlock()
	}
	v.set(func(s *vm.Status) {
		lived := exit.At.Sub(s.StartedAt)
		s.Phase, s.Step, s.PID, s.EndedAt = vm.Pending, "", 0, exit.At
		s.AgentReady, s.Addresses, s.Reason = false, nil, reason
		if stop && !crashed {
			s.Phase = vm.Stopped
		}
		if crashed {
			s.LastCrashAt, s.LastCrashReason = exit.At, reason
			if stop {
				s.Phase = vm.Failed
			}
		}
		if stop {
			return
		}
		s.Restarts++
		if !crashed {
			return
		}
		if lived > steady {
			s.Retry = 0
		}
		s.Retry++
		s.RetryAt = time.Now().Add(delay(s.Retry))
	})
}

// delay is how long to wait before a try.
func delay(tries int) time.Duration {
	d := firstDelay
	for range tries - 1 {
		d = min(2*d, lastDelay)
	}
	return d
}

// act does what is wanted, as far as it is not so already.
func (v *instance) act(ctx context.Context) (deleted bool) {
	v.mu.Lock()
	want, status := v.record, v.status
	v.mu.Unlock()
	waiting := !status.RetryAt.IsZero() && time.Now().Before(status.RetryAt)
	switch {
	case want.Deleting:
		if waiting {
			return false
		}
		if err := v.destroy(ctx); err != nil {
			v.failed(fmt.Errorf("delete: %w", err))
			return false
		}
		return true
	case want.Stopped:
		v.halt(ctx)
	case v.machine == nil && !waiting && status.Phase != vm.Failed && v.looked:
		v.start(ctx)
	}
	return false
}

// start makes one try.
func (v *instance) start(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	v.mu.Lock()
	if v.record.Stopped || v.record.Deleting {
		v.mu.Unlock()
		cancel()
		return
	}
	v.interrupt = cancel
	v.mu.Unlock()
	err := v.boot(ctx)
	v.mu.Lock()
	v.interrupt = nil
	v.mu.Unlock()
	interrupted := ctx.Err() != nil
	cancel()
	if err != nil && interrupted {
		return // asked to: whoever asked has woken us
	}
	if err != nil {
		v.failed(err)
	}
}

// failed notes why a try has failed, and when the next one is.
func (v *instance) failed(err error) {
	v.log.Error("microVM", "err", err)
	v.set(func(s *vm.Status) {
		s.Retry++
		s.Reason, s.Step, s.PID = err.Error(), "", 0
		final := errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err) && s.Retry >= hopeless
		if final && !v.record.Deleting {
			s.Phase, s.RetryAt = vm.Failed, time.Time{}
			return
		}
		if s.Phase != vm.Stopping {
			s.Phase = vm.Pending
		}
		wait := delay(s.Retry)
		if errdefs.IsUnavailable(err) { // somebody else is ill, and may be well again soon
			wait = min(wait, unavailableDelay)
		}
		s.RetryAt = time.Now().Add(wait)
	})
}

// halt stops the guest: by its agent, else by the power button, else by force. A
// delete that comes meanwhile makes it force at once; a daemon that ends leaves
// the rest to the next one.
func (v *instance) halt(ctx context.Context) {
	if v.machine != nil {
		v.set(func(s *vm.Status) { s.Phase = vm.Stopping })
		v.mu.Lock()
		client := v.agent
		stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.patience)
		v.interrupt = cancel
		if v.record.Deleting {
			cancel()
		}
		v.mu.Unlock()
		defer cancel()
		if v.askAgent(stopping, client) {
			select {
			case <-v.machine.Done():
			case <-stopping.Done():
			case <-ctx.Done():
				return
			}
		}
		err := v.machine.Stop(stopping)
		v.mu.Lock()
		v.interrupt = nil
		v.mu.Unlock()
		if err != nil {
			v.failed(fmt.Errorf("stop: %w", err))
			return
		}
		v.drop()
	}
	v.mu.Lock()
	phase := v.status.Phase
	v.mu.Unlock()
	if phase == vm.Stopped || phase == vm.Failed {
		return
	}
	v.set(func(s *vm.Status) {
		s.Phase, s.Step, s.Reason, s.PID = vm.Stopped, "", "", 0
		s.AgentReady, s.Addresses, s.RetryAt, s.EndedAt = false, nil, time.Time{}, time.Now()
	})
}

// askAgent asks the guest to power off, and says whether it has agreed.
func (v *instance) askAgent(ctx context.Context, client *agent.Client) bool {
	if client == nil || ctx.Err() != nil || !v.view().Status.AgentReady {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return client.Shutdown(ctx, false) == nil
}

// destroy removes all of the microVM, its record last, so that a killed daemon
// goes on with it.
func (v *instance) destroy(ctx context.Context) error {
	if v.machine != nil {
		if err := v.machine.Kill(); err != nil {
			return err
		}
		v.drop()
	}
	if v.metadata != nil {
		v.metadata.Close()
		v.metadata = nil
	}
	spec := v.spec
	for _, n := range spec.Interfaces {
		if err := v.host.removeLink(device(spec.UID, n)); err != nil {
			return err
		}
	}
	if err := v.host.c.Images.Release(ctx, v.lease()); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := (record{Dir: v.dir}).remove(); err != nil {
		return err
	}
	v.log.Info("microVM deleted")
	return nil
}
