package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/agent"
	"ingot/internal/boot"
	"ingot/internal/image"
	"ingot/internal/link"
	"ingot/internal/metadata"
	"ingot/internal/run"
	"ingot/internal/vm"
	"ingot/internal/vmm"
)

// boot starts the microVM: images, network, metadata, hypervisor. Each step finds
// what an earlier try has made.
func (v *instance) boot(ctx context.Context) error {
	v.course.boot()
	spec := v.view().Spec
	driver, err := v.host.driver(spec)
	if err != nil {
		return mistaken(err)
	}
	step := func(name string) {
		v.course.next(name)
		v.set(func(s *vm.Status) { s.Phase, s.Step, s.RetryAt = vm.Pending, name, time.Time{} })
	}
	step("pull")
	prepared, err := v.prepare(ctx, spec)
	if err != nil {
		return fmt.Errorf("prepare images: %w", mistaken(err))
	}
	step("network")
	links, err := v.ensureLinks(spec, false)
	if err != nil {
		return err
	}
	v.set(func(s *vm.Status) {
		s.Links, s.Volumes = links, prepared.Volumes
		s.KernelPath, s.InitrdPath = prepared.Kernel, prepared.Initrd
	})
	if err := v.serveMetadata(ctx); err != nil {
		return err
	}
	spec.Process = boot.Process(spec.Process, prepared.Process)
	cmdline, archive, err := boot.Cmdline(spec)
	if err != nil {
		return fmt.Errorf("make command line: %w", mistaken(err))
	}
	if prepared.Initrd, err = v.extendInitrd(prepared.Initrd, archive); err != nil {
		return err
	}
	if err := v.host.turns.take(ctx, func() { step("turn") }); err != nil {
		return err
	}
	v.course.next("boot")
	var turn run.Cleanup
	defer turn.Clean()
	turn.Add(v.host.turns.giveBack)
	config := vmm.Config{
		UID: spec.UID, Dir: v.dir, User: v.user, VCPU: spec.VCPU, Memory: spec.Memory,
		Kernel: prepared.Kernel, Initrd: prepared.Initrd, Cmdline: cmdline, Agent: true,
		Spawned: func(pid int) {
			v.set(func(s *vm.Status) { s.PID, s.StartedAt, s.BootTime, s.ExitCode = pid, time.Now(), 0, 0 })
		},
	}
	var files run.Cleanup
	defer files.Clean()
	if err := v.open(spec, prepared, links, &config, &files); err != nil {
		return err
	}
	sizes, err := diskSizes(config.Disks)
	if err != nil {
		return err
	}
	v.set(func(s *vm.Status) {
		s.Phase, s.Step, s.Driver, s.Accelerator = vm.Starting, "boot", driver.Name(), driver.Facts().Accelerator
	})
	if err := v.boundLogs(); err != nil {
		return err
	}
	m, err := driver.Start(ctx, config)
	if err != nil {
		return fmt.Errorf("start %s: %w", driver.Name(), err)
	}
	v.running(m, vm.Running, sizes)
	v.course.runs()
	turn.Release()
	v.host.running.Go(func() {
		defer v.host.turns.giveBack()
		v.booted(m)
	})
	v.note()
	return nil
}

// prepare gets the kernel, the initrd and the volumes, or finds those that are there.
func (v *instance) prepare(ctx context.Context, spec vm.Spec) (image.Prepared, error) {
	return v.host.c.Images.Prepare(ctx, v.lease(), needs(spec), v.progress)
}

// unsized is a spec whose volumes are as large as they are: nobody but its guest may
// change a file system that is in use.
func unsized(spec vm.Spec) vm.Spec {
	spec.Root.Size = 0
	spec.Volumes = slices.Clone(spec.Volumes)
	for i := range spec.Volumes {
		spec.Volumes[i].Size = 0
	}
	return spec
}

// extendInitrd makes the initrd one of this microVM's own where it has something
// that the command line is too short for.
func (v *instance) extendInitrd(initrd string, archive []byte) (string, error) {
	if len(archive) == 0 {
		return initrd, nil
	}
	from, err := os.Open(initrd)
	if err != nil {
		return "", fmt.Errorf("extend the initrd: %w", err)
	}
	defer from.Close()
	path := filepath.Join(v.dir, "initrd")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return "", fmt.Errorf("extend the initrd: %w", err)
	}
	// The hypervisor reads it as its own user.
	if err := errors.Join(boot.AppendInitramfs(to, from, archive), to.Chown(v.user, v.user), to.Close()); err != nil {
		return "", fmt.Errorf("extend the initrd: %w", err)
	}
	return path, nil
}

// progress shows what is being pulled.
func (v *instance) progress(p image.Progress) {
	if p.Status == "" || p.Status == "done" {
		return
	}
	text := p.Status
	if p.Total > 0 {
		text = fmt.Sprintf("%s %d%%", p.Status, p.Offset*100/p.Total)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.status.Step != text {
		v.status.Step = text
		v.tell()
	}
}

// ensureLinks makes the interfaces' taps, or finds those of a guest that is running.
func (v *instance) ensureLinks(spec vm.Spec, running bool) (map[string]vm.InterfaceStatus, error) {
	links := map[string]vm.InterfaceStatus{}
	for _, n := range spec.Interfaces {
		name := v.device(n)
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			return nil, fmt.Errorf("make interface %s: %w", n.ID, err)
		}
		var info link.Info
		switch {
		case n.Kind == vm.Macvtap:
			info, err = link.EnsureMacvtap(name, v.host.c.Parent, mac)
		case n.Metadata:
			if info, err = link.EnsureTap(name, link.Tap{}); err == nil {
				err = link.Metadata(name)
			}
		default:
			info, err = link.EnsureTap(name, link.Tap{Bridge: n.Bridge, MAC: mac})
		}
		if err == nil {
			err = v.guard(n, running)
		}
		if err != nil {
			return nil, fmt.Errorf("make interface %s: %w", n.ID, err)
		}
		links[n.ID] = vm.InterfaceStatus{
			Device: name, Index: info.Index, MAC: strings.ToUpper(info.MAC.String()), GuestMAC: n.MAC,
		}
	}
	return links, nil
}

// guard holds the guest to the addresses of one of its interfaces.
func (v *instance) guard(n vm.Interface, running bool) error {
	if v.host.c.Guard == nil || n.Metadata || n.MAC == "" || v.device(n) == "" {
		return nil // flintlock leaves the address to some guests
	}
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		return err
	}
	v.guarding.Lock() // the newest spec goes last
	defer v.guarding.Unlock()
	g := Guest{MAC: mac, Running: running && !n.Address.IsValid(), Allowed: slices.Clone(v.view().Spec.AllowedAddresses)}
	if a := n.Address.Addr(); a.IsValid() {
		g.Allowed = append(g.Allowed, netip.PrefixFrom(a, a.BitLen()))
	}
	return v.host.c.Guard(v.device(n), g)
}

// guardAgain holds a guest whose devices are there to what is allowed to it now.
func (v *instance) guardAgain() error {
	ctx, cancel := context.WithTimeout(v.host.ctx, askTime)
	defer cancel()
	select {
	case <-v.seen:
	case <-ctx.Done():
		return errors.New("the daemon has just started, and does not know yet whether the microVM runs")
	}
	v.mu.Lock()
	running := v.machine != nil
	v.mu.Unlock()
	for _, n := range v.spec.Interfaces {
		if v.device(n) == "" {
			continue
		}
		_, err := link.Get(v.device(n))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil {
			err = v.guard(n, running)
		}
		if err != nil {
			return err
		}
	}
	v.unguarded.Store(false)
	return nil
}

// serveMetadata answers the guest on its metadata interface, and writes down what
// it is told.
func (v *instance) serveMetadata(ctx context.Context) error {
	spec := v.view().Spec
	data := boot.Metadata(spec)
	text, err := json.MarshalIndent(map[string]any{"latest": data}, "", " ")
	if err != nil {
		return err
	}
	path := filepath.Join(v.dir, "metadata.json")
	if old, err := os.ReadFile(path); err != nil || !bytes.Equal(old, text) {
		if err := replace(path, text, false); err != nil {
			return err
		}
	}
	for _, n := range spec.Interfaces {
		if !n.Metadata || v.metadata != nil {
			continue
		}
		if v.metadata, err = metadata.Listen(ctx, v.device(n)); err != nil {
			return err
		}
	}
	if v.metadata != nil {
		v.metadata.Set(data)
	}
	return nil
}

// open opens the disks and network cards for the hypervisor.
func (v *instance) open(spec vm.Spec, prepared image.Prepared, links map[string]vm.InterfaceStatus, c *vmm.Config, files *run.Cleanup) error {
	for _, volume := range append([]vm.Volume{spec.Root}, spec.Volumes...) {
		path, ok := prepared.Volumes[volume.ID]
		if !ok {
			return fmt.Errorf("open volume %s: it was not prepared: %w", volume.ID, errdefs.ErrInternal)
		}
		mode := os.O_RDWR
		if volume.ReadOnly {
			mode = os.O_RDONLY
		}
		f, err := os.OpenFile(path, mode, 0)
		if err != nil {
			return fmt.Errorf("open volume %s: %w", volume.ID, err)
		}
		files.Add(func() { f.Close() })
		c.Disks = append(c.Disks, vmm.Disk{ID: volume.ID, File: f, ReadOnly: volume.ReadOnly})
	}
	for _, n := range spec.Interfaces {
		open := link.OpenTap
		if n.Kind == vm.Macvtap {
			open = link.OpenMacvtap
		}
		f, err := open(links[n.ID].Device)
		if err != nil {
			return err
		}
		files.Add(func() { f.Close() })
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			return err
		}
		c.NICs = append(c.NICs, vmm.NIC{ID: n.ID, File: f, MAC: mac})
	}
	return nil
}

// diskSizes are what a hypervisor that gets these files shows its guest at least.
func diskSizes(disks []vmm.Disk) (map[string]vm.MiB, error) {
	sizes := map[string]vm.MiB{}
	for _, d := range disks {
		n, err := d.File.Seek(0, io.SeekEnd)
		if err != nil {
			return nil, fmt.Errorf("measure volume %s: %w", d.ID, err)
		}
		sizes[d.ID] = vm.MiB(n >> 20)
	}
	return sizes, nil
}

// running notes that the hypervisor runs, with disks of these sizes if they are
// known, and listens to the guest's agent. How often it has failed, and why, is shown
// until it has run for a while.
func (v *instance) running(m vmm.Machine, phase vm.Phase, sizes map[string]vm.MiB) {
	v.growing.Lock() // who has found no hypervisor to tell must be done with it
	v.mu.Lock()
	v.machine, v.mistakes = m, 0
	v.mu.Unlock()
	v.set(func(s *vm.Status) {
		if sizes != nil {
			s.VolumeSizes = sizes
		}
		s.Phase, s.Step, s.PID, s.StartedAt, s.RetryAt = phase, "", m.PID(), m.Started(), time.Time{}
		if s.Retry == 0 {
			s.Reason = ""
		}
	})
	v.growing.Unlock()
	v.host.ledger.hold(v.spec) // also of one that is found, and should not run
	v.log.Info("microVM runs", "pid", m.PID())
	ctx, cancel := context.WithTimeout(v.host.ctx, askTime)
	defer cancel()
	if err := v.grow(ctx); err != nil { // what was asked for meanwhile
		v.log.Warn("grow volumes", "err", err)
	}
	v.hear()
}

// hear begins a conversation with the guest's agent, if there is none: its events
// come while the goroutine rests. One that is lost is made again.
func (v *instance) hear() {
	if v.machine == nil || v.agent != nil || v.mute || time.Now().Before(v.hearAt) {
		return
	}
	v.hearAt = time.Now().Add(firstDelay)
	ctx, cancel := context.WithTimeout(v.host.ctx, firstDelay)
	defer cancel()
	conn, err := v.machine.Agent(ctx)
	if err != nil {
		v.mute = errdefs.IsNotImplemented(err)
		v.log.Debug("reach the guest's agent", "err", err) // it may just end
		return
	}
	client := agent.NewClient(conn)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.agent = client
	v.show() // some may wait for it
}

// lost ends a conversation that the other side has ended.
func (v *instance) lost() {
	v.agent.Close()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.agent = nil
}

func (v *instance) heard(e agent.Event) {
	switch e.Kind {
	case agent.Ready:
		fresh, booted := false, time.Duration(0)
		v.set(func(s *vm.Status) {
			fresh = !s.AgentReady
			if !s.AgentReady && s.BootTime == 0 {
				s.BootTime = time.Since(s.StartedAt)
				booted = s.BootTime
			}
			s.AgentReady = true
			if len(e.Addresses) > 0 {
				s.Addresses = e.Addresses
			}
		})
		if booted > 0 {
			v.course.booted(booted)
		}
		if fresh {
			v.measure()
		}
	case agent.Address:
		v.set(func(s *vm.Status) { s.Addresses = e.Addresses })
	case agent.Exited:
		v.set(func(s *vm.Status) { s.ExitCode = e.Code })
	}
}

// dropAgent ends the conversation with the guest's agent, and the console.
func (v *instance) dropAgent() {
	v.mu.Lock()
	client, console := v.agent, v.console
	v.agent, v.console = nil, nil
	v.mu.Unlock()
	if client != nil {
		client.Close()
	}
	if console != nil {
		console.close()
	}
}

// The labels of what note writes, which are flintlock's.
const (
	nameLabel      = "dev.liquidmetal.flintlockd/name"
	namespaceLabel = "dev.liquidmetal.flintlockd/ns"
	uidLabel       = "dev.liquidmetal.flintlockd/uid"
	typeLabel      = "dev.liquidmetal.flintlockd/type"
	versionLabel   = "dev.liquidmetal.flintlockd/version"
)

// note writes the spec into containerd, where `ctr content ls` shows it and a lost
// directory can be rebuilt from. The microVM runs already: nothing waits for it but
// denote.
func (v *instance) note() {
	v.denote()
	if v.kept != nil {
		return // flintlock's record is there, and flintlock may come back to it
	}
	ctx, cancel := context.WithTimeout(v.host.ctx, askTime)
	noted := make(chan struct{})
	v.denote = func() { cancel(); <-noted }
	v.host.running.Go(func() {
		defer close(noted)
		defer cancel()
		text, err := json.Marshal(record{Format: recordFormat, Spec: v.spec, User: v.user})
		if err == nil {
			err = v.host.c.Images.Record(ctx, v.lease(), map[string]string{
				nameLabel: v.spec.Name, namespaceLabel: v.spec.Namespace,
				uidLabel: v.spec.UID, typeLabel: "microvm", versionLabel: "1",
			}, text)
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			v.log.Warn("write spec into containerd", "err", err)
		}
	})
}
