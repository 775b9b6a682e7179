package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/need"
	"ingot/internal/vm"
)

// testRecord is one of before a kernel's path was required.
func testRecord(root, name string) record {
	s := vm.Spec{
		UID: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Namespace: "ns", Name: name,
		Kernel: vm.Kernel{File: vm.File{Image: "kernel"}}, Root: vm.Volume{Image: "root"},
	}
	s.Normalize()
	return record{Format: recordFormat, Spec: s, User: 700001, Dir: place(root, s)}
}

func TestBrokenRecordsAreToldOf(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *record) string // what is written instead
		want   string
	}{
		"truncated":  {func(r *record) string { return `{"format": 1, "spec": {` }, "unexpected end"},
		"a new form": {func(r *record) string { r.Format = 2; return "" }, "format 2"},
		"a copy":     {func(r *record) string { r.Spec.Name = "original"; return "" }, "the record of"},
		"no spec":    {func(r *record) string { return `{"format": 1}` }, "uid: is required"},
		"a way out":  {func(r *record) string { r.Spec.Namespace = "../.."; return "" }, "namespace"},
		"unreadable": {func(r *record) string { os.Mkdir(filepath.Join(r.Dir, recordName), 0o700); return "" }, "is a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			good, bad := testRecord(root, "good"), testRecord(root, "bad")
			if err := good.create(); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(bad.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			text := c.change(&bad)
			if text == "" {
				b, _ := json.Marshal(bad)
				text = string(b)
			}
			path := filepath.Join(bad.Dir, recordName)
			os.WriteFile(path, []byte(text), 0o600) // unless it is a directory
			if err := sweepFiles(root); err != nil {
				t.Fatal(err)
			}
			all, broken, err := readRecords(root)
			if err != nil || len(all) != 1 || all[0].Dir != good.Dir {
				t.Errorf("good ones: %v, %v", all, err)
			}
			if len(broken) != 1 || broken[0].Path != path || !strings.Contains(broken[0].Err.Error(), c.want) {
				t.Errorf("broken ones: %v, want %s", broken, c.want)
			}
		})
	}
}

// What a power failure leaves of a create that nobody was told of.
func TestEmptyRecordIsNone(t *testing.T) {
	root := t.TempDir()
	r := testRecord(root, "empty")
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir, recordName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sweepFiles(root); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestPowerCut looks at the disk as it is at the moment when a record is said to
// be on it: the file that a loop device writes to has what the file system has
// written, and no more.
func TestPowerCut(t *testing.T) {
	for _, c := range []struct {
		kind   string
		logged bool
	}{{"ext4", true}, {"ext4", false}, {"xfs", true}, {"xfs", false}, {"btrfs", false}} {
		kind := c.kind
		t.Run(fmt.Sprintf("%s, by the log: %v", kind, c.logged), func(t *testing.T) {
			need.Binary(t, "mkfs."+kind)
			disk, mnt := mountDisk(t, kind)
			root, cut := filepath.Join(mnt, "vm"), disk+".cut"
			os.Mkdir(root, 0o700)
			command(t, "sync", "-f", root)
			if ok, err := ordered(root); !ok || err != nil {
				t.Fatalf("ordered: %v, %v", ok, err)
			}
			told, untold := testRecord(root, "told"), testRecord(root, "untold")
			w, err := openWAL(t.Context(), mnt, root, slog.New(slog.DiscardHandler))
			if err != nil || (w == nil) != (kind == "btrfs") {
				t.Fatalf("a write-ahead log: %v, %v", w, err)
			}
			if w != nil && !c.logged {
				w.close()
				w = nil
			}
			if err := w.create(told); err != nil {
				t.Fatal(err)
			}
			// The disk is not as it would be without the sync.
			if err := errors.Join(os.MkdirAll(untold.Dir, 0o700), replace(filepath.Join(untold.Dir, recordName), []byte("text"), false)); err != nil {
				t.Fatal(err)
			}
			command(t, "cp", "--sparse=always", disk, cut)
			w.close()
			if err := unix.Unmount(mnt, 0); err != nil {
				t.Fatal(err)
			}
			command(t, "mv", cut, disk) // btrfs knows its devices by name
			command(t, "mount", "-o", "loop", disk, mnt)
			if w != nil {
				if _, err := os.Stat(told.Dir); err == nil {
					t.Error("its place is on disk: that shows nothing of the log")
				}
				if w, err = openWAL(t.Context(), mnt, root, slog.New(slog.DiscardHandler)); err != nil {
					t.Fatal(err)
				}
				defer w.close()
			}
			r, err := readRecord(root, filepath.Join(told.Dir, recordName))
			if err != nil || r.Spec.Name != "told" {
				t.Errorf("after the power cut: %+v, %v", r, err)
			}
			if text, err := os.ReadFile(filepath.Join(untold.Dir, recordName)); len(text) > 0 {
				t.Errorf("what was not synced is there: %q, %v", text, err)
			}
		})
	}
}

// mountDisk mounts a file system of its own.
func mountDisk(t *testing.T, kind string) (disk, mnt string) {
	t.Helper()
	need.Root(t)
	need.Loop(t)
	need.Binary(t, "mkfs."+kind)
	dir := t.TempDir()
	disk, mnt = filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	command(t, "truncate", "-s", "320M", disk)
	command(t, "mkfs."+kind, disk)
	command(t, "mount", "-o", "loop", disk, mnt)
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	return disk, mnt
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
