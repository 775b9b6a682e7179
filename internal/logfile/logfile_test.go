package logfile

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// appender writes as a hypervisor does: to a file that it has open to append.
func appender(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// TestBounded: however much is written, a log and what was moved away of it stay
// within their bounds, and the newest lines are there.
func TestBounded(t *testing.T) {
	const most = 10_000
	k, err := open(most, []string{".stdout"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := k.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer stop()
	dir := t.TempDir()
	path, other := filepath.Join(dir, "vm.stdout"), filepath.Join(dir, "vm.json")
	early := appender(t, path)
	early.Write(bytes.Repeat([]byte("early\n"), 5000))
	if err := k.Add(dir); err != nil {
		t.Fatal(err)
	}
	if size(path) != 0 {
		t.Errorf("a log that was full before has %d bytes", size(path))
	}
	f, untouched := appender(t, path), appender(t, other)
	last := ""
	for i := range 5000 {
		last = fmt.Sprintf("line %d\n", i)
		f.WriteString(last)
		untouched.WriteString(last)
		if i%100 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); size(path) > most; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the log has %d bytes", size(path))
		}
	}
	if n := size(path + old); n == 0 || n > 3*most {
		t.Errorf("%d bytes were moved away", n)
	}
	var all strings.Builder
	if err := Follow(t.Context(), path, 0, false, &all); err != nil || !strings.HasSuffix(all.String(), last) {
		t.Errorf("the end of the log is %q, %v", all.String()[max(0, all.Len()-30):], err)
	}
	var end strings.Builder
	if err := Follow(t.Context(), path, size(path)+10, false, &end); err != nil || int64(end.Len()) != size(path)+10 || !strings.HasSuffix(all.String(), end.String()) {
		t.Errorf("a tail that reaches into what was moved away has %d bytes, want %d: %v", end.Len(), size(path)+10, err)
	}
	if size(other) == 0 || size(other+old) != 0 {
		t.Error("a file that is no log was touched")
	}
}

// Some logs of a directory are left to whoever writes them at a place of their own.
func TestBoundedInPart(t *testing.T) {
	k, err := open(100, []string{".stdout", ".log"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer k.events.Close()
	dir := t.TempDir()
	bounded, left := filepath.Join(dir, "vm.stdout"), filepath.Join(dir, "vm.log")
	for _, path := range []string{bounded, left} {
		appender(t, path).Write(make([]byte, 1000))
	}
	if err := k.Add(dir, ".stdout"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{bounded, left} {
		appender(t, path).Write(make([]byte, 1000))
	}
	events := make([]byte, 4096)
	n, err := k.events.Read(events)
	if err != nil {
		t.Fatal(err)
	}
	k.hear(events[:n])
	if size(bounded) != 0 || size(left) != 2000 {
		t.Errorf("%d and %d bytes", size(bounded), size(left))
	}
}

// TestFollowAcrossRotation: who follows a log sees what comes after it was emptied.
func TestFollowAcrossRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.stdout")
	f := appender(t, path)
	f.WriteString("first\n")
	ctx, stop := context.WithCancel(t.Context())
	seen := &lines{changed: make(chan bool, 100)}
	done := make(chan error, 1)
	go func() { done <- Follow(ctx, path, 0, true, seen) }()
	seen.await(t, "first\n")
	k := &Keeper{max: 1}
	if err := k.rotate(path); err != nil {
		t.Fatal(err)
	}
	f.WriteString("2\n")
	seen.await(t, "first\n2\n")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := Follow(t.Context(), path+"x", 0, false, seen); !errdefs.IsNotFound(err) {
		t.Errorf("a log that is not there: %v", err)
	}
}

type lines struct {
	mu      sync.Mutex
	text    string
	changed chan bool
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.text += string(p)
	l.mu.Unlock()
	l.changed <- true
	return len(p), nil
}

func (l *lines) await(t *testing.T, want string) {
	t.Helper()
	for deadline := time.After(10 * time.Second); ; {
		l.mu.Lock()
		text := l.text
		l.mu.Unlock()
		if text == want {
			return
		}
		select {
		case <-l.changed:
		case <-deadline:
			t.Fatalf("seen %q, want %q", text, want)
		}
	}
}
