package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/host"
	"ingot/internal/image"
	"ingot/internal/kvm"
	"ingot/internal/rpc"
	"ingot/internal/run"
	"ingot/internal/vmm"
	"ingot/internal/vmm/qemu"
)

// containerdPatience is how long a containerd that does not answer is waited for, and
// containerdTry each time: it may be starting as well.
const (
	containerdPatience = time.Minute
	containerdTry      = 5 * time.Second
)

// openImages waits for containerd, and says that it does.
func (c hostConfig) openImages(ctx context.Context, log *slog.Logger, patience time.Duration) (*image.Store, error) {
	notify(log, "STATUS=waiting for containerd at "+c.Containerd)
	for deadline := time.Now().Add(patience); ; {
		try, cancel := context.WithTimeout(ctx, min(containerdTry, time.Until(deadline)))
		images, err := image.Open(try, image.Config{
			Socket: c.Containerd, Namespace: c.ContainerdNS, Registry: c.DefaultRegistry, CAFile: c.RegistryCA, Credentials: c.RegistryAuth, Log: log,
		})
		if errdefs.IsUnavailable(err) {
			<-try.Done() // it is there, and does not serve yet
		}
		late := try.Err() != nil
		cancel()
		if late { // which is all that gRPC says of it
			if conn, why := net.DialTimeout("unix", c.Containerd, containerdTry); why != nil {
				err = why
			} else {
				conn.Close()
			}
		}
		switch {
		case err == nil:
			return images, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !late:
			return nil, err
		case !time.Now().Before(deadline):
			return nil, fmt.Errorf("wait %v for containerd: %w", patience, err)
		}
		log.Warn("containerd does not answer: trying again", "socket", c.Containerd, "err", err)
	}
}

// drivers are the hypervisors that there are. A default that is only flintlock's gives
// way to what is there.
func (c *hostConfig) drivers(log *slog.Logger) ([]vmm.Driver, error) {
	verdict := kvm.Probe()
	if !verdict.Usable {
		log.Warn("KVM can't run guests here: QEMU translates their instructions, which is slow", "err", verdict.Err)
	}
	drivers := []vmm.Driver{qemu.New(qemu.Config{KVM: verdict, Log: log})}
	there := slices.ContainsFunc(drivers, func(d vmm.Driver) bool { return d.Name() == c.DefaultProvider })
	switch {
	case there || c.DefaultProvider == "":
	case slices.Contains(flintlockProviders, c.DefaultProvider):
		log.Warn("default-provider is not here: another takes its place", "provider", c.DefaultProvider, "instead", drivers[0].Name())
		c.DefaultProvider = ""
	default:
		return nil, fmt.Errorf("default-provider: %q is not a hypervisor that is known here: %w", c.DefaultProvider, errdefs.ErrInvalidArgument)
	}
	return drivers, nil
}

var flintlockProviders = []string{"firecracker", "cloudhypervisor"}

// writable says early what would fail late: the host's records must have a place.
func writable(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make state-dir: %w", err)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("write to state-dir %s: %w", dir, err)
	}
	return nil
}

// notify tells systemd, if it listens.
func notify(log *slog.Logger, states ...string) {
	if err := run.Notify(states...); err != nil {
		log.Warn("systemd is not told", "err", err)
	}
}

// endTime is what the end may take: more than calls under way are waited for
// (rpc.Server), less than who asked for it waits before SIGKILL.
const endTime = 9500 * time.Millisecond

// keepHost runs the tasks until ctx ends or one of them fails. At the end the servers go
// first: calls under way need what the others do. One that is stuck does not keep the
// daemon: what it was about is found by the next one.
func keepHost(ctx context.Context, log *slog.Logger, h *host.Host, servers, tasks []run.Task) error {
	log.Info("flintlockd grpc api server starting")
	log.Info("starting microvm controller")
	notify(log, "STATUS=looking for microVMs")
	work, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	ended := make(chan struct{})
	defer close(ended)
	context.AfterFunc(ctx, func() {
		select {
		case <-ended:
		case <-time.After(endTime):
			log.Error("something is stuck: the daemon ends without it", "after", endTime)
			os.Exit(1)
		}
	})
	serve := run.Func("services", func(work context.Context, ready func()) error {
		serving, cancel := context.WithCancel(work)
		defer cancel()
		defer context.AfterFunc(ctx, func() {
			log.Info("flintlockd ends: calls under way are waited for, microVMs run on")
			notify(log, "STOPPING=1", "STATUS=ending")
			cancel()
		})()
		select {
		case <-h.Ready(): // so that nobody is told of half the microVMs
			ready()
			if err := run.All(serving, log, servers...); err != nil {
				return err
			}
		case <-serving.Done():
		}
		end()
		return nil
	})
	return run.All(work, log, append(tasks, serve)...)
}

// watchdog tells systemd that the server serves, and again and again that it lives.
func watchdog(log *slog.Logger, server *rpc.Server) run.Task {
	return run.Func("watchdog", func(ctx context.Context, ready func()) error {
		select {
		case <-server.Ready():
		case <-ctx.Done():
			return nil
		}
		ready()
		notify(log, "READY=1", "STATUS=serving")
		return run.Watchdog(log, server.Alive).Run(ctx)
	})
}

// debugging serves profiles, and metrics as flintlock does beside them, to whoever
// reaches the address.
func debugging(address string, metrics http.Handler) run.Task {
	return run.Func("profiles", func(ctx context.Context, ready func()) error {
		mux := http.NewServeMux()
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		mux.Handle("GET /metrics", metrics)
		l, err := run.Listen(ctx, net.ListenConfig{}, "tcp", address)
		if err != nil {
			return fmt.Errorf("serve profiles on %s: %w", address, err)
		}
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
		stop := context.AfterFunc(ctx, func() { server.Close() })
		defer stop()
		ready()
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve profiles on %s: %w", address, err)
		}
		return nil
	})
}
