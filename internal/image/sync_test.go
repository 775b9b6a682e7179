package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSyncs counts how often containerd waits for the disk. Counts are what
// matters: what a sync costs depends on the disk.
func TestSyncs(t *testing.T) {
	needs(t, "strace")
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	prepare(t, s, "flintlock/ns/first/00", standard())
	if err := s.Release(t.Context(), "flintlock/ns/first/00"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what        string
		do          func()
		least, most int // at least one where something is recorded: else strace saw nothing
	}{
		// One transaction: its pages, then its header.
		{"prepare", func() { prepare(t, s, "flintlock/ns/vm/01", standard()) }, 1, 2},
		{"prepare again", func() { prepare(t, s, "flintlock/ns/vm/01", standard()) }, 0, 0},
		// The lease, then what the garbage collector found.
		{"release", func() {
			if err := s.Release(t.Context(), "flintlock/ns/vm/01"); err != nil {
				t.Error(err)
			}
		}, 1, 4},
	} {
		if n := l.syncs(t, c.do); n < c.least || n > c.most {
			t.Errorf("%s: %d syncs, want %d to %d", c.what, n, c.least, c.most)
		} else {
			t.Logf("%s: %d syncs", c.what, n)
		}
	}
}

// syncs counts the syncs of containerd while do runs.
func (l *lab) syncs(t *testing.T, do func()) int {
	t.Helper()
	out := filepath.Join(t.TempDir(), "trace")
	trace := exec.Command("strace", "-f", "-y", "-e", "trace=fsync,fdatasync,sync,syncfs,msync,sync_file_range",
		"-o", out, "-p", fmt.Sprint(l.daemon.Process.Pid))
	said, err := trace.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := trace.Start(); err != nil {
		t.Fatal(err)
	}
	said.Read(make([]byte, 1)) // "Process … attached"
	do()
	trace.Process.Signal(os.Interrupt)
	trace.Wait()
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), "sync(")
}

// BenchmarkPrepare is one microVM after the other, images present.
func BenchmarkPrepare(b *testing.B) { benchmark(b, 1) }

// BenchmarkPrepare16 is sixteen at a time.
func BenchmarkPrepare16(b *testing.B) { benchmark(b, 16) }

func benchmark(b *testing.B, parallel int) {
	l := newLab(b)
	l.pushStandard(b)
	s := l.open(b)
	r := standard()
	r.Volumes = nil
	if _, err := s.Prepare(b.Context(), "flintlock/ns/first/00", r, nil); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	took := make([]time.Duration, b.N)
	next := make(chan int)
	var all sync.WaitGroup
	for range parallel {
		all.Go(func() {
			for i := range next {
				start := time.Now()
				if _, err := s.Prepare(b.Context(), fmt.Sprintf("flintlock/ns/vm/%d", i), r, nil); err != nil {
					b.Error(err)
				}
				took[i] = time.Since(start)
			}
		})
	}
	for i := range b.N {
		next <- i
	}
	close(next)
	all.Wait()
	b.StopTimer()
	report(b, took)
	b.ReportMetric(l.rss(b, "RssAnon"), "anon-MB")
	b.ReportMetric(l.rss(b, "VmRSS"), "rss-MB")
}

func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	at := func(p int) float64 { return float64(took[len(took)*p/100].Microseconds()) / 1000 }
	b.ReportMetric(at(50), "p50-ms")
	b.ReportMetric(at(95), "p95-ms")
}

// rss reads a line of containerd's memory in MB.
func (l *lab) rss(t testing.TB, field string) float64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", l.daemon.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), field+":")
	var kb float64
	fmt.Sscan(rest, &kb)
	return kb / 1024
}

// TestMemory: what containerd takes when it does nothing, before and after it
// has pulled and unpacked something large.
func TestMemory(t *testing.T) {
	if racing {
		t.Skip("the race detector's memory would be measured")
	}
	l := newLab(t)
	l.pushStandard(t)
	l.push(t, "large", []file{{name: "a", data: noise(80 << 20)}}, []file{{name: "b", data: noise(70 << 20)}})
	s := l.open(t)
	t.Logf("idle: anon %.0f MB, rss %.0f MB", l.rss(t, "RssAnon"), l.rss(t, "VmRSS"))
	r := standard()
	r.Root.Image = "large"
	start := time.Now()
	prepare(t, s, "flintlock/ns/vm/01", r)
	anon, all := l.rss(t, "RssAnon"), l.rss(t, "VmRSS")
	t.Logf("after a pull of 150 MB in %v: anon %.0f MB, rss %.0f MB", time.Since(start), anon, all)
	if anon > 30 || all > 60 {
		t.Errorf("anon %.0f MB, rss %.0f MB, want at most 30 and 60", anon, all)
	}
}
