package host

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func testWAL(t *testing.T, state string) *wal {
	t.Helper()
	w, err := openWAL(t.Context(), state, filepath.Join(state, "vm"), slog.New(slog.DiscardHandler))
	if err != nil || w == nil || w.failed != nil {
		t.Fatal(w, err)
	}
	return w
}

// killed leaves the log as SIGKILL does.
func (w *wal) killed(t *testing.T) {
	t.Helper()
	w.working.Wait()
	if err := w.file.Close(); err != nil {
		t.Fatal(err)
	}
}

// found are the names of the records in their places.
func found(t *testing.T, state string) map[string]bool {
	t.Helper()
	all, broken, err := readRecords(filepath.Join(state, "vm"))
	if err != nil || len(broken) > 0 {
		t.Fatal(broken, err)
	}
	names := map[string]bool{}
	for _, r := range all {
		names[r.Spec.Name] = true
	}
	return names
}

// TestWALGivesBack what a power failure takes of places, and nothing that was removed.
func TestWALGivesBack(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	root := filepath.Join(state, "vm")
	w := testWAL(t, state)
	at := func(name string) string { return testRecord(root, name).Dir }
	for _, name := range []string{"whole", "lost", "empty", "torn", "zeros", "changed", "removed", "half-removed"} {
		if err := w.create(testRecord(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"removed", "half-removed"} {
		if err := w.remove(testRecord(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	w.killed(t)
	for name, change := range map[string]func(text string) string{
		"empty":   func(string) string { return "" },
		"torn":    func(text string) string { return text[:len(text)/2] },
		"zeros":   func(text string) string { return text[:9] + strings.Repeat("\x00", len(text)-9) },
		"changed": func(text string) string { return "{" + text },
	} {
		path := filepath.Join(at(name), recordName)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(change(string(text))), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Dir(at("lost"))); err != nil {
		t.Fatal(err)
	}
	if err := testRecord(root, "half-removed").create(); err != nil { // the removal is lost
		t.Fatal(err)
	}
	if err := testWAL(t, state).close(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(at("changed"), recordName)); err != nil || !strings.HasPrefix(string(text), "{{") {
		t.Errorf("what somebody has written is %q, %v", text, err)
	}
	os.RemoveAll(at("changed")) // it can't be read
	if got := found(t, state); len(got) != 6 || got["removed"] || !got["half-removed"] {
		t.Errorf("there are %v", got)
	}
	// It forgets what is in its place.
	if err := os.RemoveAll(at("whole")); err != nil {
		t.Fatal(err)
	}
	testWAL(t, state).close()
	if found(t, state)["whole"] {
		t.Error("a record was kept")
	}
}

// TestWALTurns: many come and go at once, and the log gives way to itself.
func TestWALTurns(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	root := filepath.Join(state, "vm")
	w := testWAL(t, state)
	const workers, each = 8, 150
	var all sync.WaitGroup
	stays := make([][]string, workers)
	for i := range workers {
		all.Go(func() {
			for n := range each {
				r := testRecord(root, fmt.Sprintf("w%d-%d", i, n))
				r.Spec.Metadata = map[string]string{"user-data": strings.Repeat("x", rand.IntN(4000))}
				if err := w.create(r); err != nil {
					t.Error(err)
				}
				if n%3 == 0 {
					stays[i] = append(stays[i], r.Spec.Name)
				} else if err := w.remove(r); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	w.killed(t)
	// What the log still has is lost.
	text, err := os.ReadFile(filepath.Join(state, walName))
	if err != nil || len(text) != 2*walSize {
		t.Fatal(len(text), err)
	}
	if first := walEntries(text[:walSize]); len(first) > 0 && first[0].seq == 0 {
		t.Error("the log took no turns")
	}
	lost := 0
	for _, half := range [][]byte{text[:walSize], text[walSize:]} {
		for _, e := range walEntries(half) {
			lost++
			if err := os.RemoveAll(filepath.Join(root, e.dir)); err != nil {
				t.Fatal(err)
			}
		}
	}
	testWAL(t, state).close()
	got := found(t, state)
	for _, names := range stays {
		for _, name := range names {
			if !got[name] {
				t.Errorf("%s is lost", name)
			}
			delete(got, name)
		}
	}
	if len(got) > 0 || lost == 0 {
		t.Errorf("%v are back; %d were lost", got, lost)
	}
}

// TestWALBurst: as many as may ask at once do not wait for each other's end.
func TestWALBurst(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	root := filepath.Join(state, "vm")
	w := testWAL(t, state)
	const count = 400
	done := make(chan error, count)
	for i := range count {
		r := testRecord(root, fmt.Sprint("burst-", i))
		r.Spec.Metadata = map[string]string{"user-data": strings.Repeat("x", 4000)}
		go func() { done <- w.create(r) }()
	}
	timeout := time.After(time.Minute)
	for range count {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-timeout:
			t.Fatal("they wait for each other")
		}
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	if got := found(t, state); len(got) != count {
		t.Errorf("%d are there", len(got))
	}
}

// TestWALEnds: whoever ends in good order leaves an empty log; and nobody empties
// another's.
func TestWALEnds(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	r := testRecord(filepath.Join(state, "vm"), "one")
	w := testWAL(t, state)
	if err := w.create(r); err != nil {
		t.Fatal(err)
	}
	entries := func() int {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(state, walName))
		if err != nil {
			t.Fatal(err)
		}
		return len(walEntries(text[:walSize])) + len(walEntries(text[walSize:]))
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if second, err := openWAL(short, state, w.root, w.log); second != nil || err == nil {
		t.Error("a second daemon has the log")
	}
	if n := entries(); n != 1 {
		t.Errorf("%d entries", n)
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	if n := entries(); n != 0 {
		t.Errorf("%d entries are left", n)
	}
	if err := r.remove(); err != nil { // by a daemon that knows no log
		t.Fatal(err)
	}
	testWAL(t, state).close()
	if got := found(t, state); len(got) > 0 {
		t.Errorf("%v are back", got)
	}
}

// TestWALLoses: what can't be given back is said, and its log stays.
func TestWALLoses(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	root := filepath.Join(state, "vm")
	r := testRecord(root, "one")
	w := testWAL(t, state)
	if err := w.create(r); err != nil {
		t.Fatal(err)
	}
	w.killed(t)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root, nil, 0o600); err != nil { // nothing can be made below it
		t.Fatal(err)
	}
	w, err := openWAL(t.Context(), state, root, slog.New(slog.DiscardHandler))
	if err != nil || len(w.lost) != 1 || w.lost[0].Path != filepath.Join(r.Dir, recordName) || w.failed == nil {
		t.Fatalf("%+v, %v", w, err)
	}
	if err := w.remove(r); err == nil {
		t.Error("it was removed, and would be back")
	}
	w.close()
	if err := os.Remove(root); err != nil {
		t.Fatal(err)
	}
	testWAL(t, state).close()
	if got := found(t, state); !got["one"] {
		t.Error("it is not back")
	}
}

// TestTornWAL: an entry that was not written whole, and what is after it, is none.
func TestTornWAL(t *testing.T) {
	var half []byte
	for seq := range uint64(3) {
		half = appendWALEntry(half, 7+seq, fmt.Sprint("ns/name/", seq), []byte("{}"))
	}
	one := len(half) / 3
	half = append(half, make([]byte, walSize-len(half))...)
	if n := len(walEntries(half)); n != 3 {
		t.Fatalf("%d entries", n)
	}
	for i := one; i < 2*one; i++ {
		torn := append([]byte(nil), half...)
		torn[i] ^= 0x40
		if n := len(walEntries(torn)); n != 1 {
			t.Errorf("byte %d: %d entries", i, n)
		}
	}
	if all := walEntries(half[one : one+1]); len(all) > 0 {
		t.Error(all)
	}
	older := appendWALEntry(append([]byte(nil), half[:one]...), 3, "ns/name/old", nil)
	if n := len(walEntries(older)); n != 1 {
		t.Errorf("of an earlier turn: %d", n)
	}
}

// TestWALFails: a record that the log can't take is put on disk without it.
func TestWALFails(t *testing.T) {
	_, state := mountDisk(t, "ext4")
	root := filepath.Join(state, "vm")
	w := testWAL(t, state)
	large, kept, small := testRecord(root, "large"), testRecord(root, "kept"), testRecord(root, "small")
	large.Spec.Metadata = map[string]string{"user-data": strings.Repeat("x", walSize)}
	for _, r := range []record{large, kept} {
		if err := w.create(r); err != nil {
			t.Fatal(err)
		}
	}
	w.file.Close() // nothing can be written
	if err := w.create(small); err != nil {
		t.Fatal(err)
	}
	if got := found(t, state); len(got) != 3 {
		t.Errorf("there are %v", got)
	}
	if w.remove(large) != nil || w.remove(small) != nil || w.remove(kept) == nil { // which would be back
		t.Error("what is in the log was removed, or the others were not")
	}
	if got := found(t, state); len(got) != 1 || !got["kept"] {
		t.Errorf("there are %v", got)
	}
}
