package kvm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "kvm.json")
	asked := 0
	bad := Verdict{Stage: "1", Exit: "INTERNAL_ERROR/1", Err: errors.New("it interprets"), TSCkHz: 7}
	ask := func() Verdict { asked++; return bad }
	for range 3 {
		if v := cached(path, "boot 6.1", ask); v.Exit != bad.Exit || v.Err.Error() != "it interprets" || v.TSCkHz != 7 || v.Usable {
			t.Errorf("got %+v", v)
		}
	}
	cached(path, "boot 6.2", ask)
	if asked != 2 {
		t.Errorf("it was asked %d times, want once for each kernel", asked)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	cached(path, "boot 6.2", ask)
	if asked != 3 {
		t.Error("a broken cache was believed")
	}
}

func TestCachedForgetsWhatMayChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm.json")
	for _, v := range []Verdict{{Err: fs.ErrPermission}, {Exit: exitTimeout, Err: errors.New("slow")}} {
		cached(path, "x", func() Verdict { return v })
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%+v was kept", v)
		}
	}
}

func TestReason(t *testing.T) {
	for want, v := range map[string]Verdict{
		"":                     {Usable: true},
		"not tried":            {},
		"There is no /dev/kvm": {Err: &fs.PathError{Op: "open", Path: device, Err: fs.ErrNotExist}},
		"group kvm":            {Err: fs.ErrPermission},
		`stage "1"`:            {Stage: "1", Exit: "HLT", Err: errors.New("the guest gave up half way")},
	} {
		if got := v.Reason(); !strings.Contains(got, want) {
			t.Errorf("%+v: %q, want it to contain %q", v, got, want)
		}
	}
}
