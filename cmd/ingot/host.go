package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ingot/internal/flintlock"
	"ingot/internal/host"
	"ingot/internal/image"
	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/pki"
	"ingot/internal/pool"
	"ingot/internal/rpc"
	"ingot/internal/run"
	"ingot/internal/web"
)

// hostCommand runs the microVM host's daemon in the foreground.
func hostCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:                "host",
		Short:              "Run the microVM host's daemon (also: flintlockd run)",
		Long:               hostLong,
		DisableFlagParsing: true, // for flags that nobody knows
		RunE: func(cmd *cobra.Command, args []string) error {
			flags := cmd.Flags()
			unknown, err := parseHostFlags(flags, args)
			if err != nil {
				return misused(cmd, "%w", err)
			}
			if help, _ := flags.GetBool("help"); help {
				return cmd.Help()
			}
			if flags.NArg() > 0 {
				return misused(cmd, "%s takes no arguments: %q", cmd.CommandPath(), flags.Args())
			}
			c, err := readHostConfig(file, flags, os.Environ())
			if err != nil {
				return err
			}
			for _, name := range unknown {
				c.remark("unknown flag", "name", name)
			}
			return runHost(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default: the first of those above that is there)")
	for _, g := range hostSettings() {
		for _, s := range g.settings {
			s.add(cmd.Flags())
		}
	}
	cmd.SetUsageFunc(hostUsage)
	return cmd
}

const hostLong = `Run the microVM host's daemon in the foreground.

What is set by a flag counts before what a variable says, that before the
configuration file, and that before what is so by default. The file is YAML with
the names of the flags as keys; it is the first of

  /etc/opt/flintlockd/config.yaml
  $XDG_CONFIG_HOME/flintlockd/config.yaml, or else ~/.config/flintlockd/config.yaml

that is there (or config.yml). A variable is FLINTLOCKD_STATE-DIR or
FLINTLOCKD_STATE_DIR for --state-dir.`

// hostUsage shows the flags in their groups.
func hostUsage(cmd *cobra.Command) error {
	w := cmd.OutOrStderr()
	fmt.Fprintf(w, "Usage:\n  %s [flags]\n", cmd.CommandPath())
	rest := pflag.NewFlagSet("", pflag.ContinueOnError)
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if _, ok := settingOf(f.Name); !ok {
			rest.AddFlag(f)
		}
	})
	for _, g := range hostSettings() {
		group := pflag.NewFlagSet("", pflag.ContinueOnError)
		group.SortFlags = false
		for _, s := range g.settings {
			group.AddFlag(cmd.Flags().Lookup(s.key))
		}
		fmt.Fprintf(w, "\n%s:\n%s", g.title, group.FlagUsages())
	}
	fmt.Fprintf(w, "\nOther:\n%s", rest.FlagUsages())
	return nil
}

// runHost is the daemon: it refuses what guests must not reach, then keeps the
// microVMs and serves them.
func runHost(ctx context.Context, c hostConfig) error {
	log, err := c.log()
	if err != nil {
		return err
	}
	b := buildInfo()
	log.Info(fmt.Sprintf("flintlockd, version=%s, built_on=%s, commit=%s", b.Version, b.Date, b.Revision))
	for _, r := range c.remarks {
		log.Warn(r.text, r.args...)
	}
	// The first signal asks for an end, the second does not ask.
	stop := context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })
	defer stop()
	err = c.run(ctx, log)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil // it was asked to end before it served
	}
	if err != nil && c.LogOutput != "stderr" { // where it is told anyway
		log.Error("flintlockd ends", "err", err)
	}
	return err
}

func (c hostConfig) run(ctx context.Context, log *slog.Logger) error {
	// Memory for guests is worth more than the time to collect garbage earlier.
	debug.SetGCPercent(50)
	shown, err := c.credentials(log)
	if err != nil {
		return err
	}
	if err := writable(c.StateDir); err != nil {
		return err
	}
	guard, err := c.guard()
	if err != nil {
		return err
	}
	drivers, err := c.drivers(log)
	if err != nil {
		return err
	}
	images, err := c.openImages(ctx, log, containerdPatience)
	if err != nil {
		return err
	}
	defer images.Close()
	if _, err := pool.ReadFacts(c.Pool); err != nil { // flintlock's containerd, which has none, is served as well
		log.Warn("no new microVM can be made here", "err", err, "pool", c.Pool)
	}
	b := buildInfo()
	metrics := web.New(b.Version, b.Revision, log)
	h := host.New(host.Config{
		StateDir: c.StateDir, Bridge: c.BridgeName, Parent: c.ParentInterface, DefaultDriver: c.DefaultProvider, Pool: c.Pool,
		DeletePatience: c.DeletePatience, MaximumRetry: c.MaximumRetry,
		Limits: host.Limits{MicroVMs: c.MaxMicroVMs, VCPUOvercommit: c.VCPUOvercommit, MemoryOvercommit: c.MemoryOvercommit, ReservedMemory: c.ReservedMemory},
		Hooks:  metrics.Hooks(), Guard: func(device string, g host.Guest) error { return guard.Set(device, nat.Guest(g)) }, Images: images, Drivers: append(drivers, flintlock.Drivers(log)...), Log: log.With("controller", "microvm"),
	})
	config := rpc.Config{
		Listen: c.GRPCEndpoint, Plain: c.InsecureEndpoint, Token: pki.Secret(c.BasicAuthToken), Host: h, Images: images,
		Pool: c.Pool, Segment: c.Segment, Version: b.Version, Revision: b.Revision, BuildDate: b.Date,
		ConfigFile: c.file, StateDir: c.StateDir, Log: log, ExecAPI: c.EnableExec, SSHProxyAPI: c.EnableSSHProxy, Advertise: c.AdvertiseAddress,
	}
	config.Unary, config.Stream = metrics.Interceptors()
	source := web.Source{Host: h, Images: images, Pool: c.Pool}
	collector := image.Collector{Images: images, VMs: h.Specs, Unused: c.ImageKeep, Pool: c.Pool}
	tasks := []run.Task{keep(guard, h, log), h, run.Func(collector.String(), collector.Run)}
	if shown != nil {
		config.TLS = shown.Config()
		tasks = append(tasks, background("certificates", shown.Run))
	}
	if c.DebugEndpoint != "" {
		tasks = append(tasks, debugging(c.DebugEndpoint, metrics.Handler(source)))
	}
	server := rpc.New(config)
	servers := []run.Task{server}
	if c.EnableHTTP {
		servers = append(servers, rpc.NewGateway(config, c.HTTPEndpoint))
	}
	if c.MetricsEndpoint != "" {
		servers = append(servers, metrics.Serve(c.MetricsEndpoint, source))
	}
	return keepHost(ctx, log, h, servers, append(tasks, watchdog(log, server)))
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
		Platform: c.Machines, Hub: c.Hub, Trusted: c.Trusted, Peers: c.VPN, Management: ports,
	})
}

// keep is the task that keeps the guard's rules in force, and tells what they refuse.
func keep(guard *nat.Guard, h *host.Host, log *slog.Logger) run.Task {
	return background("guest guard", func(ctx context.Context) error {
		return guard.Keep(ctx, func() {
			log.Warn("somebody changed the nftables rules that guests are kept by: they are set again")
		}, func(all []nat.Refusal) {
			var refused []host.Refusal
			for _, r := range all {
				refused = append(refused, host.Refusal(r))
			}
			h.Refused(refused)
		})
	})
}

// background is a task that serves as soon as it runs.
func background(name string, f func(context.Context) error) run.Task {
	return run.Func(name, func(ctx context.Context, ready func()) error {
		ready()
		return f(ctx)
	})
}
