package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/need"
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

// What had no labels before is told so by the file, too.
func TestJournalOfLabels(t *testing.T) {
	dir := t.TempDir()
	j, _, end := openJournal(t, dir)
	j.relabel(Changed, named("vm", vm.Running), map[string]string{})
	j.add(Changed, named("vm", vm.Stopped))
	awaitTold(t, j, 2)
	end()
	j, _, _ = openJournal(t, dir)
	all, err := j.old(0)
	if err != nil || len(all) != 2 || all[0].Was == nil || all[1].Was != nil {
		t.Errorf("%+v, %v", all, err)
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
		for j.now() != j.cursor(uint64(n)) || func() bool { j.mu.Lock(); defer j.mu.Unlock(); return j.written != uint64(n) }() {
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

// However much a watch has missed, it has little of it in memory, and reads little of the
// files for it: a thousand that nobody reads hold up nobody else.
func TestJournalOfMany(t *testing.T) {
	dir := t.TempDir()
	j, _, end := openJournal(t, dir)
	v := named("vm", vm.Running)
	v.Status.Reason = strings.Repeat("x", 2000)
	const many = 10000 // half of them in each file
	for n := 1; n <= many; n++ {
		j.add(Changed, v)
		if n%(many/2) == 0 {
			awaitTold(t, j, n)
		}
	}
	end()
	if _, err := os.Stat(j.paths()[0]); err != nil {
		t.Fatal(err)
	}
	next, _, _ := openJournal(t, dir)
	for name, j := range map[string]*journal{"this daemon": j, "the next": next} {
		for _, seq := range []uint64{0, many / 2, many - 3*recentEvents, many - recentEvents, many - 1} {
			var batch []entry
			var err error
			work := testing.AllocsPerRun(1, func() { batch, err = j.after(t.Context(), seq) })
			if err != nil || len(batch) == 0 || batch[0].Seq != seq+1 {
				t.Fatalf("%s, after %d: %d events, %v", name, seq, len(batch), err)
			}
			if len(batch) > 100 || work > 10000 {
				t.Errorf("%s, after %d: %d events at once, for %.0f allocations", name, seq, len(batch), work)
			}
		}
	}
}

// awaitTold waits until n events were told.
func awaitTold(t *testing.T, j *journal, n int) {
	t.Helper()
	if all := collect(t, j, j.cursor(0), n); !slices.Equal(all, upTo(n)) {
		t.Fatalf("told: %v", all)
	}
}

// A power failure takes the last events with it, and the next daemon tells others: who
// has had those that are lost is not told that nothing has happened since.
func TestJournalLosesItsEnd(t *testing.T) {
	dir := t.TempDir()
	j, _, end := openJournal(t, dir)
	for range 5 {
		j.add(Changed, named("vm", vm.Running))
	}
	awaitTold(t, j, 5)
	kept := j.now()
	info, err := os.Stat(filepath.Join(dir, journalName))
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		j.add(Changed, named("vm", vm.Stopped))
	}
	awaitTold(t, j, 10)
	lost := j.now()
	end()
	if err := os.Truncate(filepath.Join(dir, journalName), info.Size()); err != nil {
		t.Fatal(err)
	}
	j, _, end = openJournal(t, dir)
	if j.now() != kept {
		t.Errorf("the newest is %s, it was %s", j.now(), kept)
	}
	for range 10 {
		j.add(Changed, named("vm", vm.Failed))
	}
	if all := collect(t, j, kept, 10); !slices.Equal(all, upTo(15)[5:]) {
		t.Errorf("after those that were kept: %v", all)
	}
	last := j.now()
	end()
	j, _, _ = openJournal(t, dir)
	for range 2 {
		if _, err := j.at(lost); !errdefs.IsOutOfRange(err) {
			t.Errorf("after one that was lost: %v", err)
		}
		if _, err := j.at(last); err != nil {
			t.Errorf("after one of another daemon: %v", err)
		}
		j.add(Changed, named("vm", vm.Running))
	}
}

// With a full disk events are told and not kept, and the next daemon knows that.
func TestJournalOnAFullDisk(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	j, _, end := openJournal(t, dir)
	j.add(Changed, named("vm", vm.Running))
	awaitTold(t, j, 1)
	kept := j.now()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	long := named("vm", vm.Running)
	long.Status.Reason = strings.Repeat("x", 8000) // more than the file's last page has room for
	j.add(Changed, long)
	awaitTold(t, j, 2)
	told := j.now()
	j.add(Changed, long)
	awaitTold(t, j, 3)
	end()
	check := func(j *journal) {
		t.Helper()
		if _, err := j.at(told); !errdefs.IsOutOfRange(err) {
			t.Errorf("after one that was not kept: %v", err)
		}
		if seq, err := j.at(kept); err != nil || seq != 1 {
			t.Errorf("after one that was: %d, %v", seq, err)
		}
	}
	j, last, end := openJournal(t, dir) // still full
	if last["vm"].Seq != 1 {
		t.Errorf("found again: %v", last)
	}
	check(j)
	j.add(Changed, long)
	awaitTold(t, j, 2)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	j.add(Changed, long)
	awaitTold(t, j, 3)
	end()
	j, last, _ = openJournal(t, dir)
	check(j)
	if last["vm"].Seq != 3 {
		t.Errorf("kept again: %v", last)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := j.after(ctx, 1); !errdefs.IsOutOfRange(err) {
		t.Errorf("over what was not kept: %v", err)
	}
}
