package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ingot/internal/host"
	"ingot/internal/image"
	"ingot/internal/kvm"
	"ingot/internal/link"
	"ingot/internal/logline"
	"ingot/internal/nat"
	"ingot/internal/pki"
	"ingot/internal/rpc"
	"ingot/internal/run"
	"ingot/internal/vmm"
	"ingot/internal/vmm/qemu"
)

// hostConfig is the host's configuration file. Its keys are flintlock's, and
// ours below them.
type hostConfig struct {
	GRPCEndpoint    string `yaml:"grpc-endpoint"`
	BasicAuthToken  string `yaml:"basic-auth-token"`
	Insecure        bool   `yaml:"insecure"`
	TLSCert         string `yaml:"tls-cert"`
	TLSKey          string `yaml:"tls-key"`
	TLSClientCheck  bool   `yaml:"tls-client-validate"`
	TLSClientCA     string `yaml:"tls-client-ca"`
	Containerd      string `yaml:"containerd-socket"`
	ContainerdNS    string `yaml:"containerd-ns"`
	BridgeName      string `yaml:"bridge-name"`
	ParentInterface string `yaml:"parent-iface"`
	StateDir        string `yaml:"state-dir"`
	DefaultProvider string `yaml:"default-provider"`
	Verbosity       int    `yaml:"verbosity"`
	EnableHTTP      bool   `yaml:"enable-http"`
	HTTPEndpoint    string `yaml:"http-endpoint"`
	EnableExec      bool   `yaml:"enable-exec-api"`
	EnableSSHProxy  bool   `yaml:"enable-ssh-proxy-api"`

	// AdvertiseAddress is where clients reach gRPC, if not where they came; the port
	// may be left out.
	AdvertiseAddress string `yaml:"advertise-address"`

	TokenFile       string `yaml:"token-file"`
	DefaultRegistry string `yaml:"default-registry"` // what short image names mean
	RegistryCA      string `yaml:"registry-ca"`
	// RegistryAuth is in the form of docker's config.json, read at each pull.
	RegistryAuth string `yaml:"registry-auth"`
	// ImageKeep is how long an image stays that no microVM uses; 0: for ever.
	ImageKeep   time.Duration `yaml:"image-keep"`
	Pool        string        `yaml:"pool"`         // where containerd's volumes live
	Machines    []netip.Addr  `yaml:"machines"`     // of the environment: guests are kept from them
	Hub         netip.Addr    `yaml:"hub"`          // the one of them that gives names, addresses and images
	Trusted     netip.Prefix  `yaml:"trusted"`      // who reaches gRPC beside the machines
	Segment     string        `yaml:"segment"`      // the segment's interface
	SegmentPort string        `yaml:"segment-port"` // its other end on the bridge, in a lab
}

const hostConfigFile = "/etc/opt/flintlockd/config.yaml"

func defaultHostConfig() hostConfig {
	return hostConfig{
		GRPCEndpoint: "localhost:9090", HTTPEndpoint: "localhost:8090", Containerd: "/run/containerd/containerd.sock", ContainerdNS: image.DefaultNamespace,
		StateDir: "/var/lib/flintlock", Pool: "/var/lib/containerd",
		RegistryAuth: "/etc/ingot/registry-auth.json", ImageKeep: image.DefaultUnused,
	}
}

// hostCommand runs the microVM host's daemon in the foreground.
func hostCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "host",
		Short: "Run the microVM host's daemon (also: flintlockd run)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readHostConfig(file, cmd.Flags().Changed("config"), cmd.Flags())
			if err != nil {
				return err
			}
			return runHost(cmd.Context(), c, file)
		},
	}
	cmd.Flags().StringVar(&file, "config", hostConfigFile, "configuration file")
	for _, key := range hostFlags {
		cmd.Flags().String(key, "", "the same as in the configuration file")
	}
	cmd.Flags().StringP("verbosity", "v", "", "2 for the steps of each microVM")
	for _, key := range vainFlags {
		cmd.Flags().String(key, "", "has no effect: for those who had flintlock's daemon")
	}
	for _, key := range []string{"insecure", "tls-client-validate", "enable-http", "enable-exec-api", "enable-ssh-proxy-api", "firecracker-detach", "cloudhypervisor-detach"} {
		cmd.Flags().Lookup(key).NoOptDefVal = "true"
	}
	return cmd
}

// hostFlags are keys of the configuration file that are flags too, as flintlock's
// users have them in their unit files. vainFlags are those of flintlock's that
// mean nothing here.
var (
	hostFlags = []string{
		"grpc-endpoint", "basic-auth-token", "insecure", "tls-cert", "tls-key", "tls-client-validate", "tls-client-ca",
		"containerd-socket", "containerd-ns", "bridge-name", "parent-iface", "state-dir", "default-provider",
		"enable-http", "http-endpoint", "enable-exec-api", "enable-ssh-proxy-api", "advertise-address",
	}
	vainFlags = []string{
		"containerd-kernel-ss", "firecracker-bin", "firecracker-detach", "cloudhypervisor-bin", "cloudhypervisor-detach",
		"virtiofs-bin", "resync-period", "deleteMicroVM-timeout", "maximum-retry",
	}
)

// override sets what flags say instead of the file.
func (c *hostConfig) override(flags *pflag.FlagSet) error {
	var errs []error
	flags.Visit(func(f *pflag.Flag) {
		if !slices.Contains(hostFlags, f.Name) && f.Name != "verbosity" {
			return
		}
		value := f.Value.String()
		if f.NoOptDefVal == "" && f.Name != "verbosity" {
			value = strconv.Quote(value)
		}
		if yaml.UnmarshalWithOptions([]byte(f.Name+": "+value+"\n"), c, yaml.Strict()) != nil {
			errs = append(errs, fmt.Errorf("--%s %s: %w", f.Name, f.Value, errdefs.ErrInvalidArgument))
		}
	})
	return errors.Join(errs...)
}

func readHostConfig(file string, must bool, flags *pflag.FlagSet) (hostConfig, error) {
	c := defaultHostConfig()
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !must {
		err = nil
	}
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if err := yaml.UnmarshalWithOptions(b, &c, yaml.Strict()); err != nil && len(b) > 0 {
		return c, fmt.Errorf("read %s: %w", file, err)
	}
	if err := c.override(flags); err != nil {
		return c, err
	}
	flags.Visit(func(f *pflag.Flag) {
		if slices.Contains(vainFlags, f.Name) {
			slog.Warn("this flag has no effect", "flag", f.Name)
		}
	})
	if c.BridgeName == "" && c.ParentInterface == "" {
		return c, errors.New("you must supply at least one of parent interface, bridge name (parent-iface, bridge-name in " + file + ")")
	}
	for key, addr := range map[string]netip.Addr{"hub": c.Hub, "trusted": c.Trusted.Addr()} {
		if addr.IsValid() && !addr.Is4() {
			return c, fmt.Errorf("read %s: %s: %s is no IPv4 address", file, key, addr)
		}
	}
	for _, addr := range c.Machines {
		if !addr.Is4() {
			return c, fmt.Errorf("read %s: machines: %s is no IPv4 address", file, addr)
		}
	}
	if c.TokenFile != "" {
		token, err := pki.ReadToken(c.TokenFile)
		if err != nil {
			return c, err
		}
		c.BasicAuthToken = string(token)
	}
	return c, nil
}

func (c hostConfig) credentials(log *slog.Logger) (*pki.Credentials, error) {
	if c.Insecure {
		if c.TLSCert != "" {
			return nil, errors.New("insecure: there is a certificate as well: choose one")
		}
		return nil, nil
	}
	if c.TLSCert == "" || c.TLSKey == "" {
		return nil, errors.New("tls-cert and tls-key are required, unless insecure is true")
	}
	f := pki.Files{Cert: c.TLSCert, Key: c.TLSKey}
	if c.TLSClientCheck {
		f.CA = c.TLSClientCA
	}
	return f.Open(log)
}

// runHost is the daemon: it refuses what guests must not reach, then keeps the
// microVMs and serves them.
func runHost(ctx context.Context, c hostConfig, file string) error {
	// Memory for guests is worth more than the time to collect garbage earlier.
	debug.SetGCPercent(50)
	level := slog.LevelInfo
	if c.Verbosity >= 2 {
		level = slog.LevelDebug
	}
	log := logline.New(os.Stderr, logline.Text, level)
	b := buildInfo()
	log.Info(fmt.Sprintf("flintlockd, version=%s, commit=%s", b.Version, b.Revision))
	shown, err := c.credentials(log)
	if err != nil {
		return err
	}
	var security *tls.Config
	tasks := []run.Task{}
	if shown != nil {
		security = shown.Config()
		tasks = append(tasks, run.Func("certificates", func(ctx context.Context, ready func()) error {
			ready()
			return shown.Run(ctx)
		}))
	}
	guard, err := c.guard()
	if err != nil {
		return err
	}
	images, err := image.Open(ctx, image.Config{
		Socket: c.Containerd, Namespace: c.ContainerdNS, Registry: c.DefaultRegistry, CAFile: c.RegistryCA, Credentials: c.RegistryAuth, Log: log,
	})
	if err != nil {
		return err
	}
	defer images.Close()
	verdict := kvm.Probe()
	if !verdict.Usable {
		log.Warn("KVM can't run guests here: QEMU translates their instructions, which is slow", "err", verdict.Err)
	}
	h := host.New(host.Config{
		StateDir: c.StateDir, Bridge: c.BridgeName, Parent: c.ParentInterface, DefaultDriver: c.DefaultProvider, Pool: c.Pool,
		Guard: guard.Set, Images: images, Drivers: []vmm.Driver{qemu.New(qemu.Config{KVM: verdict, Log: log})}, Log: log.With("controller", "microvm"),
	})
	config := rpc.Config{
		Listen: c.GRPCEndpoint, TLS: security, Token: pki.Secret(c.BasicAuthToken), Host: h, Images: images,
		Pool: c.Pool, Segment: c.Segment, Version: b.Version, Revision: b.Revision, BuildDate: b.Date,
		ConfigFile: file, StateDir: c.StateDir, Log: log, ExecAPI: c.EnableExec, SSHProxyAPI: c.EnableSSHProxy, Advertise: c.AdvertiseAddress,
	}
	server := rpc.New(config)
	collector := image.Collector{Images: images, VMs: h.Specs, Unused: c.ImageKeep, Pool: c.Pool}
	tasks = append(tasks, keep(guard, log), h, run.Func(collector.String(), collector.Run), after(h, server))
	if c.EnableHTTP {
		tasks = append(tasks, after(h, rpc.NewGateway(config, c.HTTPEndpoint)))
	}
	return run.All(ctx, log, tasks...)
}

// after runs a server once the host knows its microVMs, so that nobody is told of half
// of them.
func after(h *host.Host, server run.Task) run.Task {
	return run.Func(server.String(), func(ctx context.Context, ready func()) error {
		select {
		case <-h.Ready():
		case <-ctx.Done():
			return nil
		}
		ready()
		return server.Run(ctx)
	})
}

// guard keeps guests from this machine's services and from other machines', and to
// their own addresses. On an operator's own network, which names no segment, it
// guards the metadata interfaces only.
func (c hostConfig) guard() (*nat.Guard, error) {
	if c.Segment == "" {
		return nat.OpenGuard(nat.Host{})
	}
	ports, err := c.ports()
	if err != nil {
		return nil, err
	}
	segment, err := link.Get(c.Segment)
	if err != nil {
		return nil, err
	}
	return nat.OpenGuard(nat.Host{
		Segment: c.Segment, MAC: segment.MAC, Bridge: c.BridgeName, Port: c.SegmentPort,
		Platform: c.Machines, Hub: c.Hub, Trusted: c.Trusted, Management: ports,
	})
}

// ports are those of the host's own services.
func (c hostConfig) ports() (ports []uint16, err error) {
	endpoints := [][2]string{{"grpc-endpoint", c.GRPCEndpoint}}
	if c.EnableHTTP {
		endpoints = append(endpoints, [2]string{"http-endpoint", c.HTTPEndpoint})
	}
	for _, e := range endpoints {
		_, port, err := net.SplitHostPort(e[1])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e[0], err)
		}
		number, err := net.LookupPort("tcp", port)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e[0], err)
		}
		ports = append(ports, uint16(number))
	}
	return ports, nil
}

// keep is the task that keeps the guard's rules in force.
func keep(guard *nat.Guard, log *slog.Logger) run.Task {
	return run.Func("guest guard", func(ctx context.Context, ready func()) error {
		ready()
		return guard.Keep(ctx, func() {
			log.Warn("somebody changed the nftables rules that guests are kept by: they are set again")
		})
	})
}
