package host

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// openJournal opens the journal in a directory, and writes until the test ends.
func openJournal(t *testing.T, dir string) (j *journal, last map[string]entry, end func()) {
	t.Helper()
	j = newJournal(dir, slog.New(slog.DiscardHandler))
	last, err := j.open()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	writer.Go(func() { j.run(ctx) })
	end = func() { cancel(); writer.Wait() }
	t.Cleanup(end)
	return j, last, end
}

func named(uid string, phase vm.Phase) View {
	return View{Spec: vm.Spec{UID: uid, Namespace: "default", Name: uid}, Status: vm.Status{Phase: phase}}
}

// collect reads n events after a cursor, as numbers of the newest restart count.
func collect(t *testing.T, j *journal, from string, n int) []uint64 {
	t.Helper()
	seq, err := j.at(from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var all []uint64
	for len(all) < n {
		batch, err := j.after(ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range batch {
			all = append(all, e.Seq)
			seq = e.Seq
		}
	}
	return all
}

func upTo(n int) []uint64 {
	all := make([]uint64, n)
	for i := range all {
		all[i] = uint64(i + 1)
	}
	return all
}

// Who watches sees each event once and in order, live, late, and from another daemon.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j, last, end := openJournal(t, dir)
	if len(last) != 0 {
		t.Errorf("at first: %v", last)
	}
	start := j.now()
	const many = 3 * recentEvents
	var live []uint64
	var watching sync.WaitGroup
	watching.Go(func() { live = collect(t, j, start, many) })
	for i := range many {
		j.add(Changed, named(fmt.Sprint("vm-", i%7), vm.Running))
	}
	watching.Wait()
	if late := collect(t, j, start, many); !slices.Equal(live, upTo(many)) || !slices.Equal(late, live) {
		t.Errorf("%d events live, %d late", len(live), len(late))
	}
	j.add(Deleted, named("vm-0", vm.Stopped))
	end()
	// The last line was being written when the daemon was killed.
	path := filepath.Join(dir, journalName)
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"seq":99999,"kind":"chan`)
	f.Close()
	j, last, _ = openJournal(t, dir)
	if len(last) != 6 || last["vm-1"].Status.Phase != vm.Running {
		t.Errorf("found again: %v", last)
	}
	j.add(Changed, named("vm-1", vm.Stopped))
	if again := collect(t, j, start, many+2); !slices.Equal(again, upTo(many+2)) {
		t.Errorf("from the next daemon: %d events", len(again))
	}
	if _, err := j.at("other-3"); !errdefs.IsOutOfRange(err) {
		t.Errorf("a cursor of another journal: %v", err)
	}
	if _, err := j.at(cursor(j.id, many+100)); !errdefs.IsOutOfRange(err) {
		t.Errorf("a cursor of the future: %v", err)
	}
	for _, text := range []string{"", "x", "-", j.id + "-x"} {
		if _, err := j.at(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// The journal is bounded; who comes too late is told so, and the others miss nothing.
func TestJournalTurns(t *testing.T) {
	j, _, end := openJournal(t, t.TempDir())
	start := j.now()
	long := named("vm", vm.Running)
	long.Status.Reason = string(make([]byte, 1000)) // 6 bytes each, as JSON
	n := 0
	fill := func(size int) {
		for range size / 6000 {
			j.add(Changed, long)
			n++
		}
		for j.now() != cursor(j.id, uint64(n)) || func() bool { j.mu.Lock(); defer j.mu.Unlock(); return j.written != uint64(n) }() {
			time.Sleep(time.Millisecond)
		}
	}
	fill(journalSize / 2)
	fill(journalSize)
	if all := collect(t, j, start, n); !slices.Equal(all, upTo(n)) {
		t.Errorf("over two files: %d of %d", len(all), n)
	}
	fill(2 * journalSize)
	fill(2 * journalSize)
	end()
	if _, err := j.after(t.Context(), 0); !errdefs.IsOutOfRange(err) {
		t.Errorf("too late: %v", err)
	}
	for _, path := range j.paths() {
		if info, err := os.Stat(path); err != nil || info.Size() > 4*journalSize {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
}
