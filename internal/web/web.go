// Package web shows how a host or a hub is, over HTTP: its metrics, in the form that
// Prometheus reads. It owns what it has counted since the daemon's start, and the
// listener; all else is measured when it is asked for, and never before. It changes
// nothing, and has no profiles: those are not for who may read metrics.
package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"

	"ingot/internal/host"
	"ingot/internal/image"
	"ingot/internal/run"
	"ingot/internal/vmm"
)

// Metrics are a daemon's. They count from New on.
type Metrics struct {
	log      *slog.Logger
	registry *prometheus.Registry
	calls    *grpcprom.ServerMetrics

	works, steps  *prometheus.HistogramVec
	errors, exits *prometheus.CounterVec
	restarts      prometheus.Counter
}

// New makes the metrics of a host's daemon of this version.
func New(version, revision string, log *slog.Logger) *Metrics {
	m := &Metrics{
		log: log, registry: prometheus.NewRegistry(), calls: grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram()),
		works:    histogram("ingot_work_duration_seconds", "Time from when a microVM's creation or deletion was asked for until its hypervisor ran, or all of it was gone.", "work"),
		steps:    histogram("ingot_step_duration_seconds", "Time that a step of the work on a microVM took, if it succeeded.", "work", "step"),
		errors:   counter("ingot_reconcile_errors_total", "Tries to do what a microVM needs that failed, by the step and the kind of error.", "work", "step", "reason"),
		exits:    counter("ingot_guest_exits_total", "Guests that ended, by the cause.", "cause"),
		restarts: prometheus.NewCounter(prometheus.CounterOpts{Name: "ingot_guest_restarts_total", Help: "Guests that were started again because they had ended."}),
	}
	for _, cause := range []vmm.Cause{vmm.PowerOff, vmm.Reboot, vmm.Panic, vmm.Stopped, vmm.Killed, vmm.Error, vmm.Unknown} {
		m.exits.WithLabelValues(string(cause))
	}
	m.registry.MustRegister(m.calls, m.works, m.steps, m.errors, m.exits, m.restarts)
	m.process(version, revision)
	return m
}

// NewHub makes the metrics of a hub's daemon of this version.
func NewHub(version, revision string, log *slog.Logger) *Metrics {
	m := &Metrics{log: log, registry: prometheus.NewRegistry()}
	m.process(version, revision)
	return m
}

// process registers what all daemons tell.
func (m *Metrics) process(version, revision string) {
	build := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ingot_build_info", Help: "Always 1; the labels say which program this is.",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "goversion": runtime.Version()},
	}, func() float64 { return 1 })
	m.registry.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// durations are the histograms' buckets, in seconds: from a clone of a volume to the
// pull of a large image.
var durations = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300}

func histogram(name, help string, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: durations}, labels)
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

// Hooks are what the host tells.
func (m *Metrics) Hooks() host.Hooks {
	return host.Hooks{
		Took: func(w host.Work, step string, took time.Duration) {
			if step == "" {
				m.works.WithLabelValues(string(w)).Observe(took.Seconds())
				return
			}
			m.steps.WithLabelValues(string(w), step).Observe(took.Seconds())
		},
		Failed: func(w host.Work, step string, err error) {
			m.errors.WithLabelValues(string(w), step, reason(err)).Inc()
		},
		Ended: func(cause vmm.Cause, again bool) {
			m.exits.WithLabelValues(string(cause)).Inc()
			if again {
				m.restarts.Inc()
			}
		},
	}
}

// Interceptors count calls. They are outside those that say what an error's code is.
func (m *Metrics) Interceptors() (grpc.UnaryServerInterceptor, grpc.StreamServerInterceptor) {
	return m.calls.UnaryServerInterceptor(), m.calls.StreamServerInterceptor()
}

// surveyed is what is measured when somebody asks, until ctx ends: a Source or a
// HubSource. What could be is told of whatever the error is.
type surveyed interface {
	survey(ctx context.Context) (families, error)
}

// Source is what is measured of a host.
type Source struct {
	Host   *host.Host
	Images *image.Store
	Pool   string // the directory of the volumes' pool
}

// Bounds of what those who ask can take.
const (
	longestScrape = 10 * time.Second // after which what is not measured is left out
	atOnce        = 4                // scrapes; others are told to come again
	connections   = 64
	eachClient    = 16
)

// Handler answers with the metrics.
func (m *Metrics) Handler(s surveyed) http.Handler {
	places := make(chan struct{}, atOnce)
	options := promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
		DisableCompression: true, // what the CPU can do is the guests'
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		default:
			http.Error(w, fmt.Sprintf("%d scrapes are being answered: come again", atOnce), http.StatusServiceUnavailable)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), longestScrape)
		defer cancel()
		measured := func() (families, error) { return s.survey(ctx) }
		promhttp.HandlerFor(with(m.registry, measured), options).ServeHTTP(w, r)
	})
}

// Serve is the task that serves /metrics, by plain HTTP, to whoever reaches the address.
func (m *Metrics) Serve(address string, s surveyed) run.Task {
	return run.Func("metrics", func(ctx context.Context, ready func()) error {
		l, err := run.Listen(ctx, net.ListenConfig{}, "tcp", address)
		if err != nil {
			return fmt.Errorf("serve metrics on %s: %w", address, err)
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", m.Handler(s))
		server := &http.Server{
			Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 3 * longestScrape, IdleTimeout: 2 * time.Minute,
			MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
		}
		stop := context.AfterFunc(ctx, func() { server.Close() })
		defer stop()
		ready()
		if err := server.Serve(run.Limit(l, run.NewQuota(connections, eachClient))); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve metrics on %s: %w", address, err)
		}
		return nil
	})
}
