package vmmtest

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"ingot/internal/vmm"
)

// grow makes the first of two disks larger, which the guest sees and can use.
func (s suite) grow(t *testing.T, m vmm.Machine, con *console, disks []vmm.Disk) {
	t.Helper()
	const size = 5 << 20
	expectSizes(t, m, con, blankSize, blankSize)
	if !slices.Contains(s.driver(t).Features(), vmm.Grow) {
		if err := m.Grow(t.Context(), 0, size); !errdefs.IsNotImplemented(err) {
			t.Errorf("grow without the feature: %v", err)
		}
		expectSizes(t, m, con, blankSize, blankSize)
		return
	}
	file := disks[0].File
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again is no error
		if err := m.Grow(t.Context(), 0, size); err != nil {
			t.Fatal(err)
		}
	}
	expectSizes(t, m, con, size, blankSize)
	const word = "the-end"
	con.tell(t, "mark "+disks[0].ID+" "+word)
	if got := con.hear(t, "marked "); got != "<nil>" {
		t.Errorf("write to the end of the disk: %s", got)
	}
	for what, err := range map[string]error{
		"a smaller size": m.Grow(t.Context(), 0, blankSize),
		"no such disk":   m.Grow(t.Context(), len(disks), size),
	} {
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	expectSizes(t, m, con, size, blankSize)
	expectContent(t, file, size, word)
}

// expectSizes asks the guest until its disks have these sizes.
func expectSizes(t testing.TB, m vmm.Machine, con *console, sizes ...int64) {
	t.Helper()
	want := ""
	for _, n := range sizes {
		want += fmt.Sprintf(" %d", n)
	}
	await(t, m, "disks of"+want+" bytes", func() bool {
		con.tell(t, "sizes")
		return " "+con.hear(t, "sizes ") == want
	})
}

// expectContent looks at a disk's file: its size, and its last word.
func expectContent(t testing.TB, file *os.File, size int64, word string) {
	t.Helper()
	info, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	if _, err := file.ReadAt(got, size-int64(len(word))); err != nil || info.Size() != size || string(got) != word {
		t.Errorf("the file has %d bytes and ends with %q: %v", info.Size(), got, err)
	}
}
