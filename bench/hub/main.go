// Command hub measures the parts of `ingot hub` against the programs that they
// replace, on one pair of network interfaces in namespaces of its own, and prints
// what docs/benchmarks.md shows of the network hub, beside floor and goal. It fails
// if a floor is missed, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var (
	dir    = flag.String("dir", "/var/tmp", "where leases are kept while it runs: on a disk")
	only   = flag.String("only", "", "measure parts that begin with this")
	inside = flag.String("inside", "", "for its own use: the directory of the one that made the namespaces")
	answer = flag.Bool("answer", false, "for its own use: be the server that only answers")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	var err error
	switch {
	case *answer:
		err = answers(ctx)
	case *inside != "":
		err = measure(ctx, *inside)
	default:
		err = enclose(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/hub:", err)
		os.Exit(1)
	}
}

// enclose runs this program in namespaces of mounts, networks and processes. They go
// with it, and all that it made and started in them.
func enclose(ctx context.Context) error {
	if os.Getuid() != 0 {
		return errors.New("it needs root: sudo make bench-hub")
	}
	work, err := os.MkdirTemp(*dir, "bench-hub")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	runtime.LockOSThread() // with whose end the other one is killed
	c := exec.CommandContext(ctx, "/proc/self/exe", "-inside", work, "-only", *only)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	return c.Run()
}

// bench is a measured segment.
type bench struct {
	dir    string // on a disk
	binary string // ingot
	missed []string
}

func measure(ctx context.Context, work string) error {
	binary, err := filepath.Abs("bin/ingot")
	if err != nil {
		return err
	}
	b := &bench{dir: work, binary: binary}
	if err := b.segment(); err != nil {
		return err
	}
	load("before")
	for _, part := range []struct {
		name string
		f    func(context.Context) error
	}{{"exchanges", b.exchanges}, {"leases", b.leases}, {"way", b.way}, {"names", b.names}} {
		if !strings.HasPrefix(part.name, *only) {
			continue
		}
		if err := part.f(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	load("after")
	if len(b.missed) > 0 {
		return fmt.Errorf("below the floor: %s", strings.Join(b.missed, ", "))
	}
	return nil
}

// load prints what the machine did beside this, at least in part.
func load(when string) {
	text, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("load %s: %s", when, text)
}

func show(what, format string, args ...any) {
	fmt.Printf("%-44s %s\n", what, fmt.Sprintf(format, args...))
}

// judge prints a measure beside what is asked of it. More is better if the goal is
// above the floor.
func (b *bench) judge(what string, value, floor, goal float64, unit string) {
	better := func(than float64) bool { return value <= than }
	if goal > floor {
		better = func(than float64) bool { return value >= than }
	}
	verdict := "goal met"
	switch {
	case !better(floor):
		verdict = "FLOOR MISSED"
		b.missed = append(b.missed, what)
	case !better(goal):
		verdict = "floor met"
	}
	show(what, "%.2f%s, floor %g%s, goal %g%s: %s", value, unit, floor, unit, goal, unit, verdict)
}

// rounds is how often each of those that are compared is measured, by turns.
const rounds = 3

func median(all []float64) float64 {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

func percentile(all []float64, p int) float64 {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}
