package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/guest"
	"ingot/internal/hub"
	images "ingot/internal/image/build"
	"ingot/internal/inspect"
	"ingot/internal/lab"
	"ingot/internal/nat"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// Options of Up.
type Options struct {
	Out    io.Writer // progress, a line a step
	Binary string    // ingot; empty: this one
	Wait   time.Duration
	NoVMs  bool // don't make the first microVMs
}

// minFree is how much disk `up` wants to see free.
const minFree = 3 << 30

// up is one run of Up.
type up struct {
	Options
	env   Env
	lab   *lab.Lab
	token pki.Secret
	conns map[string]*grpc.ClientConn
	fresh bool // the environment is new

	mu sync.Mutex // guards Out
}

// Up brings an environment up, or completes one, and returns when all of it is
// green. What is as it should be is left alone.
func Up(ctx context.Context, name string, o Options) (Env, error) {
	if err := check(); err != nil {
		return Env{}, err
	}
	unlock, err := lock(name, o.Out)
	if err != nil {
		return Env{}, err
	}
	defer unlock()
	if o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return Env{}, err
		}
	}
	u := &up{Options: o, conns: map[string]*grpc.ClientConn{}}
	defer u.hangUp()
	if err := u.load(name); err != nil {
		return Env{}, err
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"network", u.chooseNetwork},
		{"certificates", u.makeCertificates},
		{"machines", u.makeMachines},
		{"configuration", u.configure},
		{"roles", u.startRoles},
		{"services", u.awaitServices},
		{"rules", u.restoreRules},
		{"images", u.provideImages},
		{"microVMs", u.startMicroVMs},
		{"inspect", u.awaitGreen},
	} {
		start := time.Now()
		detail, err := step.do(ctx)
		if err != nil {
			return u.env, fmt.Errorf("bring %s up: %s: %w", name, step.name, err)
		}
		u.say("%-14s %-50s %5.1f s", step.name, detail, time.Since(start).Seconds())
	}
	return u.env, nil
}

func (u *up) say(format string, a ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	fmt.Fprintf(u.Out, format+"\n", a...)
}

func (u *up) hangUp() {
	for _, c := range u.conns {
		c.Close()
	}
}

// check finds all that is missing on this machine before anything is changed.
func check() error {
	var missing []error
	lack := func(format string, a ...any) {
		missing = append(missing, fmt.Errorf("%w: "+format, append([]any{errdefs.ErrFailedPrecondition}, a...)...))
	}
	if runtime.GOOS != "linux" {
		lack("ingot needs Linux, and this is %s", runtime.GOOS)
		return errors.Join(missing...)
	}
	if os.Getuid() != 0 {
		lack("ingot up needs root: sudo ingot up")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		lack("/dev/net/tun is missing: modprobe tun, or give this container the device")
	}
	for binary, pkg := range map[string]string{"qemu-system-x86_64": "qemu-system-x86", "mkfs.xfs": "xfsprogs", "resize2fs": "e2fsprogs"} {
		if _, err := exec.LookPath(binary); err != nil {
			if _, err := os.Stat("/usr/sbin/" + binary); err != nil {
				lack("%s is missing: apt-get install %s", binary, pkg)
			}
		}
	}
	var s unix.Statfs_t
	for dir := Root; ; dir = filepath.Dir(dir) {
		if unix.Statfs(dir, &s) == nil {
			if free := int64(s.Bavail) * s.Bsize; free < minFree {
				lack("only %d MiB are free in %s: %d are needed", free>>20, dir, minFree>>20)
			}
			break
		}
	}
	return errors.Join(missing...)
}

// lock lets one `up` or `down` of an environment run at a time.
func lock(name string, out io.Writer) (unlock func(), err error) {
	if err := os.MkdirAll(RunRoot, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(RunRoot, name+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		fmt.Fprintf(out, "another `ingot up` or `down` of %s is at work: waiting for it\n", name)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

func (u *up) load(name string) error {
	e, err := Open(name)
	if errdefs.IsNotFound(err) {
		u.fresh = true
		e, err = Default(name), nil
	}
	u.env = e
	return err
}

// chooseNetwork takes other subnets where routes of this machine are in the way.
func (u *up) chooseNetwork(context.Context) (string, error) {
	if !u.fresh {
		u.lab = u.env.Lab(u.Binary)
		return u.env.Subnet.String(), nil
	}
	device := u.env.Lab(u.Binary).Device()
	subnet, err := lab.FreeSubnet(u.env.Subnet, device)
	if err != nil {
		return "", err
	}
	if subnet != u.env.Subnet {
		u.say("note: %s collides with a route of this machine: the lab gets %s", u.env.Subnet, subnet)
		u.env.setSubnet(subnet)
	}
	if u.env.Uplink, err = lab.FreeSubnet(u.env.Uplink, device); err != nil {
		return "", err
	}
	if err := os.MkdirAll(u.env.Dir(), 0o700); err != nil {
		return "", err
	}
	u.lab = u.env.Lab(u.Binary)
	return u.env.Subnet.String(), u.env.save()
}

// makeCertificates makes the CA, a certificate for each machine and one for the
// operator, and the token, as far as they are not there.
func (u *up) makeCertificates(context.Context) (string, error) {
	ca, err := pki.OpenCA(filepath.Join(u.env.Dir(), "ca"), "ingot environment "+u.env.Name)
	if err != nil {
		return "", err
	}
	if _, err := ca.Ensure(filepath.Join(u.env.Dir(), "client"), "operator", nil, nil); err != nil {
		return "", err
	}
	for _, m := range u.env.Machines {
		if _, err := ca.Ensure(u.pki(m), m.Name, []string{m.Name, "localhost"}, []netip.Addr{m.Address, netip.MustParseAddr("127.0.0.1")}); err != nil {
			return "", err
		}
	}
	u.token, err = u.env.Token()
	if errors.Is(err, os.ErrNotExist) {
		u.token = pki.NewToken()
		err = os.WriteFile(filepath.Join(u.env.Dir(), "token"), []byte(u.token), 0o600)
	}
	return "CA, machines, operator, token", err
}

// pki is where a machine finds its certificate, seen from outside.
func (u *up) pki(m Machine) string {
	return filepath.Join(u.env.Dir(), "machines", m.Name, "etc/ingot/pki")
}

func (u *up) makeMachines(ctx context.Context) (string, error) {
	_, err := u.lab.Ensure(ctx)
	if there, _ := nat.Present("firewalld"); there {
		u.say("note: firewalld refuses what it does not know; so that microVMs reach the world:\n  firewall-cmd --zone=trusted --add-interface=%s", u.lab.Device())
	}
	var names []string
	for _, m := range u.env.Machines {
		names = append(names, m.Name)
	}
	return strings.Join(names, ", "), err
}

// configure writes each machine's configuration.
func (u *up) configure(context.Context) (string, error) {
	changed := 0
	write := func(m Machine, path string, text []byte, mode os.FileMode) error {
		did, err := u.lab.WriteFile(m.Name, path, text, mode)
		if did {
			changed++
		}
		return err
	}
	for _, m := range u.env.Machines {
		if err := write(m, "/etc/ingot/token", []byte(u.token), 0o600); err != nil {
			return "", err
		}
		path, text := "/etc/opt/flintlockd/config.yaml", u.hostConfig(m)
		if m.Hub {
			path, text = "/etc/ingot/hub.yaml", u.hubConfig(m)
		}
		b, err := yaml.Marshal(text)
		if err != nil {
			return "", err
		}
		if err := write(m, path, b, 0o600); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d files changed", changed), nil
}

func (u *up) hubConfig(m Machine) hub.Config {
	c := hub.Default()
	c.Address, c.Subnet, c.Trusted = m.Address, u.env.Subnet, u.env.Uplink
	c.First, c.Last = u.env.dhcpRange()
	c.Domain = u.env.Name + ".internal"
	for _, other := range u.env.Machines {
		c.Machines = append(c.Machines, hub.Machine{Name: other.Name, Address: other.Address})
	}
	var err error
	if c.Upstreams, err = upstreams(); err != nil {
		u.say("note: guests will resolve names of the environment only: %v", err)
	}
	return c
}

// hostConfig is flintlock's configuration, with our keys.
func (u *up) hostConfig(m Machine) any {
	var platform []netip.Addr
	for _, other := range u.env.Machines {
		platform = append(platform, other.Address)
	}
	platform = append(platform, u.lab.RootEnd(), u.lab.HubEnd())
	return yaml.MapSlice{
		{Key: "grpc-endpoint", Value: netip.AddrPortFrom(m.Address, hub.HostPort).String()},
		{Key: "tls-cert", Value: "/etc/ingot/pki/cert.pem"},
		{Key: "tls-key", Value: "/etc/ingot/pki/key.pem"},
		{Key: "tls-client-validate", Value: true},
		{Key: "tls-client-ca", Value: "/etc/ingot/pki/ca.pem"},
		{Key: "token-file", Value: "/etc/ingot/token"},
		{Key: "bridge-name", Value: lab.Bridge},
		{Key: "parent-iface", Value: lab.Segment},
		{Key: "default-registry", Value: u.env.RegistryAddress()},
		{Key: "registry-ca", Value: "/etc/ingot/pki/ca.pem"},
		{Key: "segment", Value: lab.Segment},
		{Key: "segment-port", Value: lab.Port},
		{Key: "machines", Value: platform},
		{Key: "trusted", Value: u.env.Uplink},
	}
}

func (u *up) startRoles(ctx context.Context) (string, error) {
	count := 0
	for _, m := range u.lab.Machines {
		count += len(m.Roles)
	}
	return fmt.Sprintf("%d processes, supervised", count), u.lab.Start(ctx)
}

// awaitServices waits until the hub and the hosts answer.
func (u *up) awaitServices(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, m := range u.env.Machines {
		target, err := u.env.Target(m)
		if err != nil {
			return "", err
		}
		if u.conns[m.Name], err = wire.Dial(target); err != nil {
			return "", err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range u.env.Machines {
		group.Go(func() error {
			err := u.await(ctx, m)
			if err != nil {
				err = fmt.Errorf("%s does not answer, see `ingot machine logs %s`: %w", m.Name, m.Name, err)
			}
			return err
		})
	}
	return "gRPC of hub and hosts answers", group.Wait()
}

func (u *up) await(ctx context.Context, m Machine) error {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		var err error
		if m.Hub {
			_, err = ingotv1.NewHubClient(u.conns[m.Name]).Facts(try, &emptypb.Empty{}, grpc.WaitForReady(true))
		} else {
			_, err = v1alpha1.NewMicroVMClient(u.conns[m.Name]).ListMicroVMs(try, &v1alpha1.ListMicroVMsRequest{}, grpc.WaitForReady(true))
		}
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// restoreRules has the hub set its rules again, which it does when it starts, if
// somebody took one away.
func (u *up) restoreRules(ctx context.Context) (string, error) {
	hub := u.env.Hub()
	facts, err := ingotv1.NewHubClient(u.conns[hub.Name]).Facts(ctx, &emptypb.Empty{})
	if err != nil {
		return "", err
	}
	nat := facts.GetNat()
	if len(nat.GetMissing()) == 0 && nat.GetForwarding() {
		return "in force", nil
	}
	if err := u.lab.Restart(ctx, hub.Name, "hub"); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return "set again", u.await(ctx, hub)
}

// provideImages builds and pushes the images that the registry has not got, or
// has of another build.
func (u *up) provideImages(ctx context.Context) (string, error) {
	init, err := guest.Init()
	if err != nil {
		return "", err
	}
	r := images.Registry{Address: u.env.RegistryAddress(), CAFile: u.env.CAFile(), User: "ingot", Password: string(u.token)}
	o := images.Options{Progress: func(s string) { u.say("  %s", s) }}
	stamp := imageStamp(init)
	pushed := filepath.Join(u.env.Dir(), "images")
	if b, err := os.ReadFile(pushed); err == nil && bytes.Equal(b, stamp) {
		there, err := images.Exists(ctx, r, "kernel")
		if err != nil {
			return "", err
		}
		if also, err := images.Exists(ctx, r, "busybox"); err == nil && there && also {
			return "kernel, busybox (there)", nil
		}
	}
	kernel, err := images.Kernel(ctx, o, init)
	if err == nil {
		_, err = images.Push(ctx, r, "kernel", kernel)
	}
	if err != nil {
		return "", err
	}
	busybox, err := images.Busybox(ctx, o)
	if err == nil {
		_, err = images.Push(ctx, r, "busybox", busybox)
	}
	if err != nil {
		return "", err
	}
	return "kernel, busybox (pushed)", os.WriteFile(pushed, stamp, 0o600)
}

// startMicroVMs makes one microVM on each host of a new environment.
func (u *up) startMicroVMs(ctx context.Context) (string, error) {
	if u.env.Started || u.NoVMs {
		return "none to make", nil
	}
	var names []string
	for i, m := range u.env.Hosts() {
		name := fmt.Sprintf("vm-%d", i)
		names = append(names, name)
		client := v1alpha1.NewMicroVMClient(u.conns[m.Name])
		have, err := client.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{Namespace: "default", Name: &name})
		if err != nil {
			return "", err
		}
		if len(have.GetMicrovm()) > 0 {
			continue // an earlier `up` was killed after this
		}
		if _, err := client.CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{Microvm: firstSpec(name)}); err != nil {
			return "", err
		}
	}
	u.env.Started = true
	return strings.Join(names, ", "), u.env.save()
}

func firstSpec(name string) *types.MicroVMSpec {
	vmlinux, initrd, busybox := "boot/vmlinux", "boot/initrd", "busybox"
	return &types.MicroVMSpec{
		Id: name, Namespace: "default", Vcpu: 1, MemoryInMb: 256, AllowGuestAgent: true,
		Kernel:     &types.Kernel{Image: "kernel", Filename: &vmlinux},
		Initrd:     &types.Initrd{Image: "kernel", Filename: &initrd},
		RootVolume: &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &busybox}},
		Interfaces: []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP}},
	}
}

// Inspection is the environment as package inspect wants it.
func (e Env) Inspection(conns map[string]*grpc.ClientConn) inspect.Environment {
	machine := func(m Machine) inspect.Machine {
		target, _ := e.Target(m)
		return inspect.Machine{Name: m.Name, Address: m.Address, Endpoint: target.Address, Conn: conns[m.Name]}
	}
	i := inspect.Environment{Name: e.Name, Hub: machine(e.Hub())}
	for _, m := range e.Hosts() {
		i.Hosts = append(i.Hosts, machine(m))
	}
	return i
}

func (u *up) awaitGreen(ctx context.Context) (string, error) {
	wait := u.Wait
	if wait == 0 {
		wait = 3 * time.Minute // a guest without KVM takes its time
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	r := inspect.Wait(ctx, u.env.Inspection(u.conns), func(inspect.Report) {})
	if !r.OK {
		found := r.Findings()
		return "", fmt.Errorf("not green after %s: %v: %w", wait, found, errdefs.ErrUnavailable)
	}
	return "all green", nil
}
