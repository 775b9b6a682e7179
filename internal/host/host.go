// Package host keeps the microVMs of one machine as their specs say: one goroutine
// each, which looks and then acts. It owns the state directory, the taps and the
// lives of the hypervisors that it starts; they outlive it. It knows neither gRPC
// nor the network hub.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"ingot/internal/image"
	"ingot/internal/link"
	"ingot/internal/logfile"
	"ingot/internal/pool"
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
	// Guard is told the MAC address of the guest behind each device on a network,
	// before the guest can send, and nil before the device is removed. nil: nobody.
	Guard   func(device string, mac net.HardwareAddr) error
	Images  *image.Store
	Drivers []vmm.Driver
	Log     *slog.Logger
}

// Host keeps microVMs. New only allocates; Run finds what is there and keeps it.
type Host struct {
	c     Config
	ready chan struct{}
	began time.Time

	logs    *logfile.Keeper // from Run on
	mu      sync.Mutex      // guards what follows
	ctx     context.Context
	vms     map[string]*instance
	running sync.WaitGroup
}

// New makes a host.
func New(c Config) *Host {
	return &Host{c: c, ready: make(chan struct{}), began: time.Now(), vms: map[string]*instance{}}
}

// Ready is closed once all microVMs that were there are known.
func (h *Host) Ready() <-chan struct{} { return h.ready }

func (h *Host) String() string { return "microvm controller" }

// Run keeps the microVMs until ctx ends, which leaves them running.
func (h *Host) Run(ctx context.Context) error {
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
	if err := sweepFiles(h.root()); err != nil {
		h.c.Log.Warn("remove leftovers", "err", err)
	}
	records, err := readRecords(h.root())
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.ctx = ctx
	for _, r := range records {
		h.keep(r)
	}
	h.mu.Unlock()
	if err := h.sweep(ctx); err != nil {
		h.c.Log.Warn("remove leftovers", "err", err)
	}
	close(h.ready)
	<-ctx.Done()
	h.running.Wait()
	return nil
}

func (h *Host) root() string { return filepath.Join(h.c.StateDir, "vm") }

// keep starts a microVM's goroutine. The caller holds h.mu.
func (h *Host) keep(r record) *instance {
	v := newInstance(h, r)
	h.vms[r.Spec.UID] = v
	h.running.Go(func() {
		if v.run(h.ctx) {
			h.mu.Lock()
			delete(h.vms, r.Spec.UID)
			h.mu.Unlock()
			v.finish()
		}
	})
	return v
}

// sweep removes what a killed daemon has left: taps and leases of ours that
// belong to no microVM.
func (h *Host) sweep(ctx context.Context) error {
	wanted := map[string]bool{}
	h.mu.Lock()
	for _, v := range h.vms {
		wanted[v.lease()] = true
		for _, n := range v.spec.Interfaces {
			wanted[device(v.spec.UID, n)] = true
		}
	}
	h.mu.Unlock()
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
	leases, err := h.c.Images.Leases(ctx)
	if err != nil {
		return errors.Join(append(problems, err)...)
	}
	for _, lease := range leases {
		if strings.HasPrefix(lease, leasePrefix) && !wanted[lease] {
			h.c.Log.Info("removing a leftover lease", "lease", lease)
			problems = append(problems, h.c.Images.Release(ctx, lease))
		}
	}
	return errors.Join(problems...)
}

// removeLink removes a guest's device, which then guards nobody's address.
func (h *Host) removeLink(device string) error {
	if h.c.Guard != nil {
		if err := h.c.Guard(device, nil); err != nil {
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
// in the background. A spec with the uid of one that is there returns that one.
func (h *Host) Create(ctx context.Context, s vm.Spec) (View, error) {
	s.Normalize()
	if err := s.Validate(); err != nil {
		return View{}, err
	}
	if err := h.suit(&s); err != nil {
		return View{}, err
	}
	if err := h.room(); err != nil {
		return View{}, fmt.Errorf("create microVM %s/%s: %w", s.Namespace, s.Name, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx == nil || h.ctx.Err() != nil {
		return View{}, fmt.Errorf("create microVM: the daemon is not ready: %w", errdefs.ErrUnavailable)
	}
	if v := h.vms[s.UID]; v != nil {
		return v.view(), nil
	}
	if s.UID == "" {
		s.UID = ulid.Make().String()
	}
	s.CreatedAt = time.Now().UTC()
	for i := range s.Interfaces {
		if s.Interfaces[i].MAC == "" {
			s.Interfaces[i].MAC = link.MAC(s.UID + "/" + s.Interfaces[i].ID).String()
		}
	}
	r := record{Format: recordFormat, Spec: s, User: h.freeUser(), Dir: filepath.Join(h.root(), s.Namespace, s.Name, s.UID)}
	if err := r.save(); err != nil {
		return View{}, fmt.Errorf("create microVM %s/%s: %w", s.Namespace, s.Name, err)
	}
	return h.keep(r).view(), nil
}

// room says whether there is room for one more microVM's volumes.
func (h *Host) room() error {
	if h.c.Pool == "" {
		return nil
	}
	f, err := pool.ReadFacts(h.c.Pool)
	if err != nil {
		return err
	}
	return f.Full()
}

// suit makes a spec one that this host can run, or says why it can't.
func (h *Host) suit(s *vm.Spec) error {
	if s.Driver != "" {
		if !slices.ContainsFunc(h.c.Drivers, func(d vmm.Driver) bool { return d.Name() == s.Driver }) {
			return &vm.FieldError{Field: "provider", Problem: fmt.Sprintf("microvm provider %s isn't available", s.Driver)}
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		if total := int64(info.Totalram) * int64(info.Unit); s.Memory.Bytes() > total {
			return fmt.Errorf("memory_in_mb: %d is more than this machine has, %d: %w", s.Memory, total>>20, errdefs.ErrResourceExhausted)
		}
	}
	for _, v := range append([]vm.Volume{s.Root}, s.Volumes...) {
		if v.VirtioFS != "" {
			return &vm.FieldError{Field: "additional_volumes", Problem: "virtiofs not supported by the microvm provider"}
		}
	}
	for i := range s.Interfaces {
		n := &s.Interfaces[i]
		if n.Kind == vm.Macvtap && h.c.Parent == "" {
			n.Kind = vm.Tap
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

// Users are what hypervisors run as: one each, so that none can reach another's files.
const firstUser, lastUser = 700000, 765535

func (h *Host) freeUser() int {
	taken := map[int]bool{}
	for _, v := range h.vms {
		taken[v.user] = true
	}
	for user := firstUser; user < lastUser; user++ {
		if !taken[user] {
			return user
		}
	}
	return lastUser
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

// List returns the microVMs of a namespace and name, either empty for all, oldest first.
func (h *Host) List(namespace, name string) []View {
	h.mu.Lock()
	all := make([]*instance, 0, len(h.vms))
	for _, v := range h.vms {
		all = append(all, v)
	}
	h.mu.Unlock()
	var views []View
	for _, v := range all {
		w := v.view()
		if (namespace == "" || w.Spec.Namespace == namespace) && (name == "" || w.Spec.Name == name) {
			views = append(views, w)
		}
	}
	slices.SortFunc(views, func(a, b View) int { return strings.Compare(a.Spec.UID, b.Spec.UID) })
	return views
}

// Delete begins to remove a microVM; Get says not found once all of it is gone.
func (h *Host) Delete(uid string) error {
	v, err := h.find(uid)
	if err != nil {
		return err
	}
	return v.want(func(r *record) error {
		r.Deleting = true
		return nil
	})
}

// Start starts a stopped or failed microVM.
func (h *Host) Start(uid string) (View, error) {
	v, err := h.find(uid)
	if err != nil {
		return View{}, err
	}
	if err := v.want(func(r *record) error { return r.stop(false) }); err != nil {
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
	v.setPatience(timeout)
	if err := v.want(func(r *record) error { return r.stop(true) }); err != nil {
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
func (h *Host) LogFile(uid, name string) (string, error) {
	w, err := h.Get(uid)
	if err != nil {
		return "", err
	}
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
		if f.Available {
			return d, nil
		}
		reasons = append(reasons, d.Name()+": "+f.Reason)
	}
	return nil, fmt.Errorf("find a driver: %s: %w", strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
}

// Uptime is how long the host has been kept.
func (h *Host) Uptime() time.Duration { return time.Since(h.began) }

// readRecords reads what is in the state directory.
func readRecords(root string) ([]record, error) {
	paths, err := filepath.Glob(filepath.Join(root, "*", "*", "*", recordName))
	if err != nil {
		return nil, err
	}
	var all []record
	for _, path := range paths {
		r, err := readRecord(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}
