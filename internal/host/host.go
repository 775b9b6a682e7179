// Package host keeps the microVMs of one machine as their specs say: one goroutine
// each, which looks and then acts. It owns the state directory, the taps and the
// lives of the hypervisors that it starts; they outlive it. It knows neither gRPC
// nor the network hub.
package host

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/oklog/ulid/v2"

	"ingot/internal/image"
	"ingot/internal/link"
	"ingot/internal/logfile"
	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// Config is what a host is made of.
type Config struct {
	StateDir      string // microVMs are in its vm/NAMESPACE/NAME/UID
	Bridge        string // where taps are joined
	Parent        string // what macvtaps sit on; empty: taps are made instead
	DefaultDriver string // empty: the first that is available
	Pool          string // what package pool opened; empty: nobody looks how full it is
	// DeletePatience is how long a guest may take to shut down before it is deleted; 0:
	// it is not asked to.
	DeletePatience time.Duration
	// MaximumRetry is how often a microVM that could not be started is tried again before
	// it has failed; 0: as often as it takes.
	MaximumRetry int
	// Guard is told who the guest behind each device on a network is, before the guest
	// can send, and a Guest without a MAC address before the device is removed. nil:
	// nobody.
	Guard   func(device string, g Guest) error
	Images  *image.Store
	Drivers []vmm.Driver
	Limits  Limits
	Log     *slog.Logger
	Hooks   Hooks
}

// Guest is who sends by a device.
type Guest struct {
	MAC net.HardwareAddr
	// Allowed are the addresses that it may use beside the one that DHCP gives it.
	Allowed []netip.Prefix
	Running bool // since before this daemon, with what DHCP gave it
}

// Host keeps microVMs. New only allocates; Run finds what is there and keeps it.
type Host struct {
	c     Config
	ready chan struct{}
	began time.Time
	turns turns

	ledger  *ledger
	events  *journal
	logs    *logfile.Keeper // from Run on
	wal     *wal            // likewise
	running sync.WaitGroup

	mu     sync.Mutex // guards what follows; no disk is waited for under it
	ctx    context.Context
	vms    map[string]*instance
	keys   map[string]string        // uids by the key that they were asked for with
	users  map[int]bool             // that hypervisors have
	making map[string]chan struct{} // by uids and keys: closed once such a microVM is recorded, or could not be
	broken []Broken
}

// New makes a host.
func New(c Config) *Host {
	c.Hooks = c.Hooks.filled()
	return &Host{
		c: c, ready: make(chan struct{}), began: time.Now(), turns: newTurns(c.Drivers), ledger: newLedger(c.Limits), events: newJournal(c.StateDir, c.Log), vms: map[string]*instance{},
		keys: map[string]string{}, users: map[int]bool{}, making: map[string]chan struct{}{},
	}
}

// Ready is closed once all microVMs that were there are known.
func (h *Host) Ready() <-chan struct{} { return h.ready }

func (h *Host) String() string { return "microvm controller" }

// Run keeps the microVMs until ctx ends, which leaves them running.
func (h *Host) Run(ctx context.Context) error {
	// In flintlock's words, as far as they are true here.
	h.c.Log.Info(fmt.Sprintf("starting microvm controller with %d workers", cap(h.turns)))
	h.c.Log.Info("resyncing microvm specs")
	logs, err := logfile.Open([]string{".stdout", ".stderr", ".log", ".metrics", ".events"}, h.c.Log)
	if err != nil {
		return err
	}
	h.logs = logs
	h.running.Go(func() {
		if err := logs.Run(ctx); err != nil {
			h.c.Log.Error("logs are not bounded any more", "err", err)
		}
	})
	if h.wal, err = openWAL(ctx, h.c.StateDir, h.root(), h.c.Log); err != nil {
		return err
	}
	defer h.wal.close()
	if err := sweepFiles(h.root()); err != nil {
		h.c.Log.Warn("remove leftovers", "err", err)
	}
	records, broken, err := readRecords(h.root())
	if err != nil {
		return err
	}
	if h.wal != nil {
		broken = append(broken, h.wal.lost...)
	}
	last, err := h.events.open()
	if err != nil {
		return fmt.Errorf("open the journal of events: %w", err)
	}
	writing, written := context.WithCancel(context.WithoutCancel(ctx))
	var writer sync.WaitGroup
	defer writer.Wait()
	defer written()
	writer.Go(func() { h.events.run(writing) })
	h.mu.Lock()
	for _, r := range records {
		if h.vms[r.Spec.UID] != nil {
			broken = append(broken, Broken{filepath.Join(r.Dir, recordName), errors.New("another record has this uid")})
			continue
		}
		v := newInstance(h, r)
		if e := last[r.Spec.UID]; e.Status.Version > v.status.Version { // the daemon before was killed
			v.status, v.noted = e.Status, notable(e.Status)
		}
		h.register(v)
	}
	h.mu.Unlock()
	h.c.Log.Info("starting event listener")
	h.catchUp(last)
	h.mu.Lock()
	h.ctx = ctx
	for _, v := range h.vms {
		h.begin(v)
	}
	h.mu.Unlock()
	h.report(broken...)
	if err := h.sweep(ctx); err != nil {
		h.c.Log.Warn("remove leftovers", "err", err)
	}
	close(h.ready)
	<-ctx.Done()
	h.running.Wait()
	return nil
}

func (h *Host) root() string { return filepath.Join(h.c.StateDir, "vm") }

// report says what can't be read, in the log and to those who ask.
func (h *Host) report(broken ...Broken) {
	for _, b := range broken {
		h.c.Log.Error("a microVM's record can't be read: it is left as it is", "path", b.Path, "err", b.Err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.broken = append(h.broken, broken...)
}

// Broken are the records that could not be read at the start. Their microVMs are left
// as they are: nothing of them is changed or removed.
func (h *Host) Broken() []Broken {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.broken)
}

// keep starts to keep a microVM that was not there before. The caller holds h.mu.
func (h *Host) keep(r record, fresh bool) *instance {
	v := newInstance(h, r)
	if v.looked = fresh; fresh {
		v.course.asked = r.Spec.CreatedAt
		close(v.seen)
	}
	h.register(v)
	h.events.add(Created, v.view())
	h.begin(v)
	return v
}

// register lets a microVM be found. The caller holds h.mu.
func (h *Host) register(v *instance) {
	h.vms[v.spec.UID] = v
	h.users[v.user] = true
	if !v.idle() {
		h.ledger.hold(v.spec)
	}
	if v.key != "" {
		h.keys[v.key] = v.spec.UID
	}
}

func (h *Host) forget(v *instance) {
	h.ledger.give(v.spec.UID)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.vms, v.spec.UID)
	delete(h.users, v.user)
	if v.key != "" {
		delete(h.keys, v.key)
	}
}

// begin starts a microVM's goroutine. The caller holds h.mu.
func (h *Host) begin(v *instance) {
	h.running.Go(func() {
		if v.run(h.ctx) {
			h.forget(v)
			v.finish()
		}
	})
}

// sweep removes what daemons that were killed have left, once all microVMs are known:
// those of flintlock's are found by their leases.
func (h *Host) sweep(ctx context.Context) error {
	if err := h.sweepLeases(ctx); err != nil {
		return err
	}
	if err := h.findStrays(); err != nil {
		return err
	}
	return h.sweepLinks()
}

// sweepLinks removes the taps that a killed daemon has left. Those of a microVM
// whose record can't be read are not known: then all stay.
func (h *Host) sweepLinks() error {
	wanted := map[string]bool{}
	h.mu.Lock()
	for _, v := range h.vms {
		for _, n := range v.spec.Interfaces {
			wanted[v.device(n)] = true
		}
	}
	blind := len(h.broken) > 0 || wanted[""] // of flintlock's
	h.mu.Unlock()
	if blind {
		return nil
	}
	links, err := link.List()
	if err != nil {
		return err
	}
	var problems []error
	for _, l := range links {
		if (strings.HasPrefix(l.Name, "fltap") || strings.HasPrefix(l.Name, "flvtap")) && !wanted[l.Name] {
			h.c.Log.Info("removing a leftover interface", "name", l.Name)
			problems = append(problems, h.removeLink(l.Name))
		}
	}
	return errors.Join(problems...)
}

// sweepLeases finds leases without a record. What containerd knows the spec of
// has lost its directory, and gets it back; others are leftovers of a create or
// delete that was killed, and are released.
func (h *Host) sweepLeases(ctx context.Context) error {
	wanted := map[string]bool{}
	h.mu.Lock()
	for _, v := range h.vms {
		wanted[v.lease()] = true
	}
	for _, b := range h.broken {
		if place, err := filepath.Rel(h.root(), filepath.Dir(b.Path)); err == nil {
			wanted[leasePrefix+place] = true
		}
	}
	h.mu.Unlock()
	leases, err := h.c.Images.Leases(ctx)
	if err != nil {
		return err
	}
	var problems []error
	for _, lease := range leases {
		place, ours := strings.CutPrefix(lease, leasePrefix)
		if ours && !wanted[lease] {
			problems = append(problems, h.rebuild(ctx, lease, filepath.Join(h.root(), place)))
		}
	}
	return errors.Join(problems...)
}

// removeLink removes a guest's device, which then guards nobody's address.
func (h *Host) removeLink(device string) error {
	if h.c.Guard != nil {
		if err := h.c.Guard(device, Guest{}); err != nil {
			return err
		}
	}
	return link.Remove(device)
}

// View is a microVM as others see it.
type View struct {
	Spec   vm.Spec
	Status vm.Status
	Dir    string
}

// Create records a microVM, which is on disk when Create returns, and starts it
// in the background. A spec with the uid of one that is there, or asked for with the
// key that it was asked for with, returns that one, if it is the same. The key may be
// empty.
func (h *Host) Create(ctx context.Context, s vm.Spec, key string) (View, error) {
	s.Normalize()
	if err := s.Validate(); err != nil {
		return View{}, err
	}
	if err := h.suit(&s); err != nil {
		return View{}, err
	}
	h.mu.Lock()
	err := h.awake()
	h.mu.Unlock()
	if err != nil {
		return View{}, fmt.Errorf("create microVM %s/%s: %w", s.Namespace, s.Name, err)
	}
	if h.asked(s.UID, key) == nil { // else it was looked at before
		if err := h.c.Images.Check(ctx, needs(s)); err != nil {
			return View{}, err
		}
	}
	v, err := h.create(ctx, s, key)
	if err != nil {
		return View{}, fmt.Errorf("create microVM %s/%s: %w", s.Namespace, s.Name, err)
	}
	return v.view(), nil
}

// needs are the images and files that a microVM is made of.
func needs(s vm.Spec) image.Request {
	return image.Request{Kernel: s.Kernel.File, Initrd: s.Initrd, Root: s.Root, Volumes: s.Volumes}
}

func (h *Host) create(ctx context.Context, s vm.Spec, key string) (*instance, error) {
	for {
		if v := h.asked(s.UID, key); v != nil {
			return v, v.same(s)
		}
		v, busy, err := h.record(s, key)
		if busy == nil {
			return v, err
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// record puts a microVM on disk and begins to keep it. While another one of its uid or
// key is being recorded it does nothing: busy is closed once that is over.
func (h *Host) record(s vm.Spec, key string) (v *instance, busy <-chan struct{}, err error) {
	var asked vm.MiB
	for _, volume := range append([]vm.Volume{s.Root}, s.Volumes...) {
		asked += volume.Size
	}
	if err := h.roomFor(asked); err != nil {
		return nil, nil, err
	}
	s.UID = cmp.Or(s.UID, ulid.Make().String())
	s.CreatedAt = time.Now().UTC()
	s.Interfaces = slices.Clone(s.Interfaces) // what was asked for has none of these addresses
	addMACs(&s)
	user, busy, err := h.reserve(s, key)
	if err != nil || busy != nil {
		return nil, busy, err
	}
	defer h.running.Done()
	r := record{Format: recordFormat, Spec: s, User: user, Key: key, Asked: digest(s), Dir: place(h.root(), s)}
	if err = h.wal.create(r); err != nil {
		r.remove() // nobody is told of it
	}
	h.c.Hooks.recorded(s.CreatedAt, err)
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.making[s.UID])
	delete(h.making, s.UID)
	delete(h.making, making(key))
	if err != nil {
		delete(h.users, user)
		h.ledger.give(s.UID)
		return nil, nil, scarce(err)
	}
	return h.keep(r, true), nil, nil
}

// asked is the microVM that was asked for by a uid or a key, or nil.
func (h *Host) asked(uid, key string) *instance {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.vms[uid]; v != nil {
		return v
	}
	return h.vms[h.keys[key]]
}

// addMACs gives each interface the address that follows from the uid.
func addMACs(s *vm.Spec) {
	for i, n := range s.Interfaces {
		if n.MAC == "" {
			s.Interfaces[i].MAC = link.MAC(s.UID + "/" + n.ID).String()
		}
	}
}

// awake says whether the host takes microVMs. The caller holds h.mu.
func (h *Host) awake() error {
	if h.ctx == nil || h.ctx.Err() != nil {
		return fmt.Errorf("the daemon is not ready: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// reserve takes a uid and a key, a user for them, and what the microVM is promised. The host does not end before
// Done is called on h.running. Of what somebody else is recording busy is closed once that
// is over.
func (h *Host) reserve(s vm.Spec, key string) (user int, busy <-chan struct{}, err error) {
	uid := s.UID
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.awake(); err != nil {
		return 0, nil, err
	}
	for _, name := range []string{uid, making(key)} {
		if busy := h.making[name]; busy != nil {
			return 0, busy, nil
		}
	}
	if h.vms[uid] != nil || key != "" && h.keys[key] != "" { // by now
		busy := make(chan struct{})
		close(busy)
		return 0, busy, nil
	}
	for _, b := range h.broken {
		if filepath.Base(filepath.Dir(b.Path)) == uid {
			return 0, nil, fmt.Errorf("read %s: %w: %w", b.Path, b.Err, errdefs.ErrFailedPrecondition)
		}
	}
	if err := h.ledger.take(s); err != nil {
		return 0, nil, err
	}
	made := make(chan struct{})
	h.making[uid] = made
	if key != "" {
		h.making[making(key)] = made
	}
	h.running.Add(1)
	return h.freeUser(uid), nil, nil
}

// making is a key among the uids of what is being made.
func making(key string) string { return "key/" + key }

// suit makes a spec one that this host can run, or says why it can't.
func (h *Host) suit(s *vm.Spec) error {
	if s.Driver != "" {
		if !slices.ContainsFunc(h.c.Drivers, func(d vmm.Driver) bool { return d.Name() == s.Driver && !d.Facts().AttachOnly }) {
			return &vm.FieldError{Field: "provider", Problem: fmt.Sprintf("microvm provider %s isn't available", s.Driver)}
		}
	}
	if total := machineMemory(); total > 0 && s.Memory > total {
		return fmt.Errorf("memory_in_mb: %d is more than this machine has, %d: %w", s.Memory, total, errdefs.ErrResourceExhausted)
	}
	for i, v := range s.Volumes {
		if v.VirtioFS != "" {
			return &vm.FieldError{Field: fmt.Sprintf("additional_volumes[%d].source.virtiofs_source", i), Problem: "virtiofs not supported by the microvm provider"}
		}
	}
	noMacvtap := h.noMacvtap(*s)
	for i := range s.Interfaces {
		n := &s.Interfaces[i]
		if n.Kind == vm.Macvtap && noMacvtap != "" {
			n.Kind, n.Instead, n.Because = vm.Tap, vm.Macvtap, noMacvtap
		}
		if n.Kind == vm.Tap && n.Bridge == "" {
			n.Bridge = h.c.Bridge
		}
		if n.Kind == vm.Tap && n.Bridge == "" && n.ID != vm.MetadataInterface {
			return &vm.FieldError{Field: fmt.Sprintf("interfaces[%d]", i), Problem: "this host has no bridge-name, and the interface names none"}
		}
	}
	if !slices.ContainsFunc(s.Interfaces, func(n vm.Interface) bool { return n.ID == vm.MetadataInterface }) {
		s.Interfaces = slices.Insert(s.Interfaces, 0, vm.Interface{
			ID: vm.MetadataInterface, Kind: vm.Tap, MAC: vm.MetadataMAC,
			Address: netip.MustParsePrefix("169.254.0.1/16"), Metadata: true,
		})
	}
	return nil
}

// noMacvtap is why a microVM can't have a macvtap, which is what an interface is whose
// type nobody set; empty if it can.
func (h *Host) noMacvtap(s vm.Spec) string {
	if h.c.Parent == "" {
		return "the host has no parent-iface"
	}
	if d, err := h.driver(s); err == nil && !slices.Contains(d.Features(), vmm.Macvtap) {
		return d.Name() + " has none"
	}
	return ""
}

// Users are what hypervisors run as: one each, so that none can reach another's
// files. Which one follows from the uid: hosts that share a kernel, as in a lab, do
// not know of each other's.
const firstUser, users = 700000, 1 << 30

// freeUser takes one. The caller holds h.mu.
func (h *Host) freeUser(uid string) int {
	sum := sha256.Sum256([]byte(uid))
	user := firstUser + int(binary.BigEndian.Uint32(sum[:])%users)
	for h.users[user] {
		user++
	}
	h.users[user] = true
	return user
}

func (h *Host) find(uid string) (*instance, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vms[uid]
	if v == nil {
		return nil, fmt.Errorf("microvm spec %s not found%w", uid, silent{errdefs.ErrNotFound})
	}
	return v, nil
}

// silent gives an error a meaning without a text of its own.
type silent struct{ error }

func (silent) Error() string { return "" }

func (s silent) Unwrap() error { return s.error }

// Get returns one microVM.
func (h *Host) Get(uid string) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	return v.view(), nil
}

// all are the microVMs that are there.
func (h *Host) all() []*instance {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Values(h.vms))
}

// List returns the microVMs of a namespace and name, either empty for all, oldest first.
func (h *Host) List(namespace, name string) []View {
	asked := slices.DeleteFunc(h.all(), func(v *instance) bool {
		return namespace != "" && v.spec.Namespace != namespace || name != "" && v.spec.Name != name
	})
	slices.SortFunc(asked, func(a, b *instance) int { return strings.Compare(a.spec.UID, b.spec.UID) })
	views := make([]View, len(asked))
	for i, v := range asked {
		views[i] = v.view()
	}
	return views
}

// Specs are those of all microVMs, running or not.
func (h *Host) Specs() []vm.Spec {
	var specs []vm.Spec
	for _, v := range h.List("", "") {
		specs = append(specs, v.Spec)
	}
	return specs
}

// Delete begins to remove a microVM; Get says not found once all of it is gone.
func (h *Host) Delete(uid string) error {
	v, err := h.find(uid)
	if err != nil {
		return err
	}
	var by time.Time
	if h.c.DeletePatience > 0 {
		by = time.Now().Add(h.c.DeletePatience)
	}
	return v.want(func(r *record) error {
		if r.Deleting {
			return nil
		}
		r.Deleting, r.DeletedAt = true, time.Now().UTC()
		if r.StopBy.IsZero() || by.Before(r.StopBy) {
			r.StopBy = by
		}
		return nil
	})
}

// Start starts a stopped or failed microVM.
func (h *Host) Start(uid string) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	if err := v.wantRun(func(r *record) error { return r.stop(false) }); err != nil {
		return View{}, err
	}
	return v.view(), nil
}

// Stop shuts a microVM down, insists after the timeout, and returns when the
// hypervisor is gone.
func (h *Host) Stop(ctx context.Context, uid string, timeout time.Duration) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	by := time.Now().Add(timeout)
	if err := v.want(func(r *record) error {
		err := r.stop(true)
		r.StopBy, r.Patience = by, timeout
		return err
	}); err != nil {
		return View{}, err
	}
	views, cancel := v.subscribe()
	defer cancel()
	for {
		select {
		case w, ok := <-views:
			if !ok {
				return View{}, fmt.Errorf("stop microVM: microvm spec %s not found%w", uid, silent{errdefs.ErrNotFound})
			}
			if w.Status.Phase == vm.Stopped || w.Status.Phase == vm.Failed {
				return w, nil
			}
			if !v.stops() {
				return View{}, fmt.Errorf("stop microVM %s: somebody started it again: %w", uid, errdefs.ErrFailedPrecondition)
			}
		case <-ctx.Done():
			return View{}, context.Cause(ctx)
		}
	}
}

// Watch sends the microVM as it is and after each change; a slow reader sees the
// newest. The channel is closed when the microVM is gone.
func (h *Host) Watch(uid string) (<-chan View, func(), error) {
	v, err := h.find(uid)
	if err != nil {
		return nil, nil, err
	}
	views, cancel := v.subscribe()
	return views, cancel, nil
}

// LogFile is the path of one of a microVM's logs: stdout, stderr, log, metrics.
// The metrics get a line that says what is so now.
func (h *Host) LogFile(uid, name string) (string, error) {
	v, err := h.find(uid)
	if err != nil {
		return "", err
	}
	w := v.view()
	switch name {
	case "":
		name = "stdout"
	case "stdout", "stderr", "log", "metrics":
	default:
		return "", &vm.FieldError{Field: "file", Problem: fmt.Sprintf("%q is none of stdout, stderr, log, metrics", name)}
	}
	driver := w.Status.Driver
	if driver == "" {
		return "", fmt.Errorf("read log of %s: it has not started yet: %w", w.Spec.Name, errdefs.ErrFailedPrecondition)
	}
	if name == "metrics" {
		v.measure()
	}
	return filepath.Join(w.Dir, driver+"."+name), nil
}

// Drivers says which drivers this host has.
func (h *Host) Drivers() map[string]vmm.Facts {
	facts := map[string]vmm.Facts{}
	for _, d := range h.c.Drivers {
		facts[d.Name()] = d.Facts()
	}
	return facts
}

// lacks says whether a driver has not a feature.
func (h *Host) lacks(driver string, f vmm.Feature) bool {
	return slices.ContainsFunc(h.c.Drivers, func(d vmm.Driver) bool {
		return d.Name() == driver && !slices.Contains(d.Features(), f)
	})
}

// DefaultDriver is the name of the driver of a spec that names none.
func (h *Host) DefaultDriver() (string, error) {
	d, err := h.driver(vm.Spec{})
	if err != nil {
		return "", err
	}
	return d.Name(), nil
}

// driver is the one that a spec asks for, or the default.
func (h *Host) driver(s vm.Spec) (vmm.Driver, error) {
	name := s.Driver
	if name == "" {
		name = h.c.DefaultDriver
	}
	var reasons []string
	for _, d := range h.c.Drivers {
		if name != "" && d.Name() != name {
			continue
		}
		f := d.Facts()
		switch {
		case f.Available:
			return d, nil
		case f.AttachOnly && name != "":
			return nil, fmt.Errorf("%s%w", f.Reason, silent{errdefs.ErrNotImplemented})
		case f.AttachOnly:
			continue
		}
		reasons = append(reasons, d.Name()+": "+f.Reason)
	}
	return nil, fmt.Errorf("find a driver: %s: %w", strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
}

// Uptime is how long the host has been kept.
func (h *Host) Uptime() time.Duration { return time.Since(h.began) }
