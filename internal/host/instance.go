package host

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/agent"
	"ingot/internal/flintlock"
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
	// askTime is how long a guest may take to hear that it should shut down.
	askTime = 5 * time.Second
)

const leasePrefix = "flintlock/"

// instance is one microVM. Its goroutine owns what runs; others read and change
// what is wanted.
type instance struct {
	host *Host
	log  *slog.Logger
	wake chan struct{}
	seen chan struct{} // closed once the goroutine has looked for what an earlier daemon has started
	spec vm.Spec       // as this daemon found it: sizes of volumes, labels and metadata change, in the record
	dir  string
	user int
	key  string
	kept *flintlock.Things // nil: it is not flintlock's

	retell    atomic.Bool // the metadata has changed
	unguarded atomic.Bool // the guest may not be held to the addresses that it is allowed
	guarding  sync.Mutex  // while it is being held to them

	// Of the goroutine.
	course   course
	metadata *metadata.Server
	denote   func()    // ends the writing of its spec into containerd
	looked   bool      // for what an earlier daemon has started
	told     bool      // it was to stop: its end is no choice of the guest's
	asked    bool      // the guest's agent was asked to shut down
	pressed  bool      // the guest's power button was
	stopBy   time.Time // when it is ended by force
	hearAt   time.Time // when the guest's agent may be tried again
	saveAt   time.Time // when a status that could not be written down is tried again
	mute     bool      // its hypervisor has no way to a guest's agent

	saving    sync.Mutex // one change of the record at a time, disk and all; comes before mu
	attaching sync.Mutex // one opening of the console at a time; comes before mu
	growing   sync.Mutex // one growing of the volumes at a time, disk and hypervisor and all; comes before mu

	mu        sync.Mutex  // guards what follows; no disk is waited for under it
	machine   vmm.Machine // only the goroutine changes it
	record    record
	status    vm.Status
	noted     vm.Status          // as the journal of events has it
	labeled   map[string]string  // likewise
	dirty     bool               // the status is not on disk
	mistakes  int                // tries in a row that failed by a mistake
	interrupt context.CancelFunc // ends the try in progress
	watchers  map[chan View]bool
	agent     *agent.Client // only the goroutine changes it
	console   *console
	gone      bool
	admitting int // who asks for room for it to run again
}

func newInstance(h *Host, r record) *instance {
	status := readStatus(r.Dir)
	if r.Stopped || r.Deleting {
		status.Retry, status.RetryAt = 0, time.Time{} // that was before it was asked for
	}
	// The clock may be another one than what these were noted by.
	status.RetryAt = atMost(status.RetryAt, lastDelay)
	r.StopBy = atMost(r.StopBy, cmp.Or(r.Patience, defaultPatience))
	if r.Flintlock != nil {
		describe(&status, r)
	}
	v := &instance{
		host: h, spec: r.Spec, dir: r.Dir, user: r.User, key: r.Key, kept: r.Flintlock, record: r, told: r.Stopped, status: status,
		wake: make(chan struct{}, 1), seen: make(chan struct{}), watchers: map[chan View]bool{}, denote: func() {},
		log: h.c.Log.With("vm", r.Spec.Namespace+"/"+r.Spec.Name, "uid", r.Spec.UID),
	}
	v.noted, v.labeled = notable(v.view().Status), clone(r.Spec.Labels)
	v.course.hooks = h.c.Hooks
	return v
}

// lease is the name under which containerd keeps what this microVM uses.
func (v *instance) lease() string {
	s := v.spec
	return leasePrefix + s.Namespace + "/" + s.Name + "/" + s.UID
}

// device is the name of an interface's tap. It follows from the uid, so that a
// crash between making a tap and noting it loses nothing. flintlock's follow from
// nothing: that of one which it has not written down is empty.
func (r record) device(n vm.Interface) string {
	if r.Flintlock != nil {
		return r.Flintlock.Devices[n.ID]
	}
	sum := sha256.Sum256([]byte(r.Spec.UID + "/" + n.ID))
	prefix := "fltap"
	if n.Kind == vm.Macvtap {
		prefix = "flvtap"
	}
	return prefix + fmt.Sprintf("%x", sum)[:7]
}

func (v *instance) device(n vm.Interface) string {
	return record{Spec: v.spec, Flintlock: v.kept}.device(n)
}

func (v *instance) view() View {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.viewLocked()
}

func (v *instance) viewLocked() View {
	w := View{Spec: v.record.Spec, Status: v.status, Dir: v.dir}
	if v.record.Deleting {
		w.Status.Phase, w.Status.DeletedAt = vm.Deleting, v.record.DeletedAt
	}
	return w
}

// same says whether a spec is the microVM's, but for what the host has added.
func (v *instance) same(s vm.Spec) error {
	v.mu.Lock()
	deleting, asked := v.record.Deleting, cmp.Or(v.record.Asked, digest(v.record.Spec))
	v.mu.Unlock()
	if deleting {
		return fmt.Errorf("microvm %s is being deleted: %w", v.spec.UID, errdefs.ErrFailedPrecondition)
	}
	s.UID = v.spec.UID
	addMACs(&s)
	if digest(s) != asked {
		return fmt.Errorf("microvm %s is there, and is another one: %w", v.spec.UID, errdefs.ErrAlreadyExists)
	}
	return nil
}

// want changes what is wanted of the microVM, on disk, and tells its goroutine.
// Whoever asks does not wait for the end of a back-off.
func (v *instance) want(change func(*record) error) error {
	if err := v.change(change); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.status.Retry, v.status.RetryAt, v.mistakes = 0, time.Time{}, 0
	if v.status.Phase == vm.Failed && (!v.record.Stopped || v.record.Again) {
		v.status.Phase, v.status.Reason = vm.Pending, ""
	}
	if v.interrupt != nil && (v.record.Stopped || v.record.Deleting) {
		v.interrupt()
	}
	v.tell()
	v.poke()
	return nil
}

// change changes what is wanted, on disk first.
func (v *instance) change(change func(*record) error) error {
	v.saving.Lock()
	defer v.saving.Unlock()
	v.mu.Lock()
	was, gone := v.record, v.gone
	v.mu.Unlock()
	if gone {
		return fmt.Errorf("microvm spec %s not found%w", v.spec.UID, silent{errdefs.ErrNotFound})
	}
	next := was
	if err := change(&next); err != nil {
		return err
	}
	if reflect.DeepEqual(next, was) {
		return nil
	}
	if err := next.save(); err != nil {
		return fmt.Errorf("record what is wanted of %s: %w", v.spec.Name, scarce(err))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.record = next
	return nil
}

// stops says whether it is still wanted that it does not run.
func (v *instance) stops() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.record.Stopped || v.record.Deleting
}

func (v *instance) poke() {
	select {
	case v.wake <- struct{}{}:
	default:
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

// tell sends the status around; the goroutine writes it down when it rests. The
// caller holds v.mu.
func (v *instance) tell() {
	v.status.Version++
	v.status.UpdatedAt = time.Now().UTC()
	v.dirty = true
	v.settle()
	v.show()
	w := v.viewLocked()
	if n := notable(w.Status); !reflect.DeepEqual(n, v.noted) {
		v.noted = n
		v.host.events.add(Changed, w)
	}
}

// show sends around what is so now. The caller holds v.mu.
func (v *instance) show() {
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
	v.host.events.add(Deleted, v.viewLocked())
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
		v.hear()
		v.save()
		v.rest(ctx)
	}
	v.save()
	return false
}

// rest waits until there is something to do.
func (v *instance) rest(ctx context.Context) {
	var ended <-chan struct{}
	if v.machine != nil {
		ended = v.machine.Done()
	}
	var events <-chan agent.Event
	if v.agent != nil {
		events = v.agent.Events()
	}
	var again <-chan time.Time
	if at := v.next(); !at.IsZero() {
		timer := time.NewTimer(time.Until(at))
		defer timer.Stop()
		again = timer.C
	}
	select {
	case <-ctx.Done():
	case <-v.wake:
	case <-ended:
	case e, ok := <-events:
		if !ok {
			v.lost()
			return
		}
		v.heard(e)
	case <-again:
	}
}

// next is when the time for something comes, if nothing happens before: one that
// runs steadily has no timer.
func (v *instance) next() time.Time {
	v.mu.Lock()
	retry, retryAt, startedAt := v.status.Retry, v.status.RetryAt, v.status.StartedAt
	v.mu.Unlock()
	var at time.Time
	sooner := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	if retryAt.After(time.Now()) {
		sooner(retryAt)
	}
	if !v.saveAt.IsZero() {
		sooner(v.saveAt)
	}
	if v.machine == nil {
		return at
	}
	if v.agent == nil && !v.mute {
		sooner(v.hearAt)
	}
	if !v.stopBy.IsZero() && !retryAt.After(time.Now()) {
		sooner(v.stopBy)
	}
	if retry > 0 {
		sooner(startedAt.Add(steady))
	}
	return at
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
	v.told, v.asked, v.pressed, v.mute, v.stopBy, v.hearAt = false, false, false, false, time.Time{}, time.Time{}
}

// look finds out whether the hypervisor runs, and how it ended if it did.
func (v *instance) look(ctx context.Context) {
	if v.machine == nil {
		if !v.looked {
			if v.find(ctx); v.looked {
				close(v.seen)
			}
		}
		return
	}
	select {
	case <-v.machine.Done():
		exit := v.ours(v.machine.Exit())
		v.drop()
		v.ended(exit)
		return
	default:
	}
	v.mu.Lock()
	retry, since := v.status.Retry, v.status.StartedAt
	v.mu.Unlock()
	if retry > 0 && time.Since(since) >= steady {
		v.set(func(s *vm.Status) { s.Retry, s.Reason = 0, "" })
	}
}

// ours makes the end of a guest that was told to stop our doing: somebody may have
// wanted it to run again meanwhile.
func (v *instance) ours(exit vmm.Exit) vmm.Exit {
	if v.told && (exit.Cause == vmm.PowerOff || exit.Cause == vmm.Reboot) {
		exit.Cause = vmm.Stopped
	}
	return exit
}

// ended decides what follows from a hypervisor's end.
func (v *instance) ended(exit vmm.Exit) {
	policy := v.spec.Restart
	reason := string(exit.Cause)
	if exit.Detail != "" {
		reason += ": " + exit.Detail
	}
	asked := v.stops()
	_, lost := v.host.driver(v.spec)
	final := errdefs.IsNotImplemented(lost) // nothing will start it again
	stop, crashed, again := false, false, false
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
	if err := v.change(func(r *record) error { r.Paused = false; return nil }); err != nil {
		v.log.Error("record that it is not paused", "err", err)
	}
	if stop && !asked {
		// It is recorded, so that the next daemon does not start it either.
		err := v.change(func(r *record) error { r.Stopped = true; return nil })
		if err != nil {
			v.log.Error("record that it has stopped", "err", err)
		}
	}
	v.set(func(s *vm.Status) {
		lived := exit.At.Sub(s.StartedAt)
		s.Step, s.PID, s.EndedAt = "", 0, exit.At
		s.AgentReady, s.Addresses, s.Reason, s.RetryAt = false, nil, reason, time.Time{}
		if crashed && !asked {
			s.LastCrashAt, s.LastCrashReason = exit.At, reason
		}
		switch {
		case asked:
			s.Phase, s.Reason = vm.Stopped, ""
		case stop && crashed:
			s.Phase = vm.Failed
		case stop:
			s.Phase = vm.Stopped
		case final:
			s.Phase, s.Reason = vm.Failed, reason+"; "+lost.Error()
		case exit.Cause == vmm.Stopped: // and wanted again
			s.Phase, s.Reason = vm.Pending, ""
		default:
			again = true
			s.Phase = vm.Pending
			s.Restarts++
			if lived >= steady {
				s.Retry = 0
			}
			// One that reboots at once again and again costs as much as one that crashes.
			if crashed || lived < steady {
				s.Retry++
				s.RetryAt = time.Now().Add(delay(s.Retry))
			}
		}
	})
	v.host.c.Hooks.Ended(exit.Cause, again)
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
	if v.metadata != nil && v.retell.CompareAndSwap(true, false) {
		if err := v.serveMetadata(ctx); err != nil {
			v.log.Error("serve metadata", "err", err)
		}
	}
	switch {
	case !v.looked: // it may run: nothing is safe to do
	case status.RetryAt.After(time.Now()):
	case want.Deleting && v.machine != nil && time.Now().Before(want.StopBy):
		v.halt(ctx, want)
	case want.Deleting:
		if err := v.destroy(ctx, want.DeletedAt); err != nil {
			v.failed(fmt.Errorf("delete: %w", err))
			return false
		}
		return true
	case want.Stopped && want.Again && v.machine == nil:
		v.course.leave(Starting)
		if err := v.change(func(r *record) error { return r.again() }); err != nil {
			v.failed(fmt.Errorf("restart: %w", err))
			return false
		}
		v.told = false
		v.start(ctx)
	case want.Stopped:
		v.halt(ctx, want)
	case v.machine != nil && want.Paused != (status.Phase == vm.Paused):
		v.pause(ctx, want.Paused)
	case v.machine == nil && status.Phase != vm.Failed:
		v.start(ctx)
	}
	return false
}

// interruptible is a context that ends with ctx, or when somebody wants
// something else.
func (v *instance) interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.interrupt = cancel
	return ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.interrupt = nil
		cancel()
	}
}

// start makes one try.
func (v *instance) start(ctx context.Context) {
	ctx, cancel := v.interruptible(ctx)
	defer cancel()
	if v.stops() {
		return // who wants something else has woken us
	}
	if err := v.boot(ctx); err != nil && ctx.Err() == nil {
		v.failed(err)
	}
}

// mistake is an error of the spec or of an image, with which another try ends, too,
// unless somebody mends the image: then tries is how many are made.
type mistake struct {
	error
	tries int
}

func (m *mistake) Unwrap() error { return m.error }

// mistaken finds the mistake in what failed for no reason but what was asked for.
func mistaken(err error) error {
	switch {
	case errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err):
		return &mistake{err, 1}
	case errdefs.IsNotFound(err):
		return &mistake{err, hopeless}
	}
	return err
}

// failed notes why a try has failed, and when the next one is.
func (v *instance) failed(err error) {
	v.log.Error("microVM", "err", err)
	v.course.failed(err)
	var m *mistake
	v.mu.Lock()
	if errors.As(err, &m) {
		v.mistakes++
	} else {
		v.mistakes = 0
	}
	final := m != nil && v.mistakes >= m.tries
	v.mu.Unlock()
	v.set(func(s *vm.Status) {
		s.Retry++
		// What somebody else's illness costs does not count: containerd's, a registry's.
		most := v.host.c.MaximumRetry
		if most > 0 && s.Retry > most && v.machine == nil && !v.record.Deleting && !errdefs.IsUnavailable(err) {
			final = true
		}
		s.Reason, s.Step = err.Error(), ""
		if v.machine == nil {
			s.PID = 0
		}
		if final {
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

// halt stops the guest: by its agent, else by the power button, and by force when
// its time is over. It does not wait for the guest: a delete or another deadline
// may come meanwhile, and a daemon that ends leaves the rest to the next one.
func (v *instance) halt(ctx context.Context, want record) {
	if v.machine == nil {
		v.set(func(s *vm.Status) {
			if s.Phase != vm.Stopped && s.Phase != vm.Failed {
				s.Phase, s.Step, s.Reason, s.PID = vm.Stopped, "", "", 0
				s.AgentReady, s.Addresses, s.RetryAt = false, nil, time.Time{}
			}
		})
		return
	}
	v.told = true
	v.course.leave(Stopping)
	v.mu.Lock()
	paused := v.status.Phase == vm.Paused // also of one that is being deleted
	v.mu.Unlock()
	if paused { // or it could not hear what it is asked
		v.pause(ctx, false)
	}
	v.set(func(s *vm.Status) { s.Phase = vm.Stopping })
	if !want.StopBy.IsZero() {
		v.stopBy = want.StopBy
	} else if v.stopBy.IsZero() {
		v.stopBy = time.Now().Add(defaultPatience)
	}
	if !time.Now().Before(v.stopBy) {
		if err := v.machine.Kill(); err != nil {
			v.failed(fmt.Errorf("stop: %w", err))
		}
		return
	}
	v.mu.Lock()
	client, ready := v.agent, v.status.AgentReady
	v.mu.Unlock()
	ctx, cancel := v.interruptible(ctx)
	defer cancel()
	try := func(what string, do func(ctx context.Context) error) bool {
		ctx, cancel := context.WithDeadline(ctx, earlier(v.stopBy, time.Now().Add(askTime)))
		defer cancel()
		err := do(ctx)
		if err != nil {
			v.log.Debug(what, "err", err)
		}
		return err == nil
	}
	switch {
	case client != nil && ready && !v.asked: // also one that is heard of only now
		v.asked = true
		if try("ask the guest to shut down", func(ctx context.Context) error { return client.Shutdown(ctx, false) }) {
			return
		}
	case v.asked || v.pressed:
		return
	}
	v.pressed = true
	try("press the power button", v.machine.Press)
}

// destroy removes all of the microVM, its record last, so that a killed daemon
// goes on with it.
func (v *instance) destroy(ctx context.Context, asked time.Time) error {
	v.course.leave(Deleting)
	if v.machine != nil {
		v.course.next("stop")
		if err := v.machine.Kill(); err != nil {
			return err
		}
		v.drop()
	}
	v.course.next("network")
	if v.metadata != nil {
		v.metadata.Close()
		v.metadata = nil
	}
	for _, n := range v.spec.Interfaces {
		if name := v.device(n); name == "" {
			continue
		} else if err := v.host.removeLink(name); err != nil {
			return err
		}
	}
	if v.kept != nil {
		if err := v.kept.Clear(v.dir); err != nil {
			return err
		}
	}
	v.course.next("images")
	v.denote()
	if err := v.host.c.Images.Release(ctx, v.lease()); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	v.course.next("record")
	if err := v.host.wal.remove(record{Dir: v.dir}); err != nil {
		return err
	}
	v.course.deleted(asked)
	v.log.Info("microVM deleted")
	return nil
}
