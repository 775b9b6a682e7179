package kvm

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	device = "/dev/kvm"
	// CacheFile holds the verdict for as long as machine and kernel stay the same.
	CacheFile = "/run/ingot/kvm.json"
	// budget is what the guest may take. On a CPU it needs less than 5 ms.
	budget = 500 * time.Millisecond
)

// Probe answers, from the cache if this kernel was asked before in this run of
// the machine. An answer that depends on who asks is not kept.
func Probe() Verdict { return cached(CacheFile, identity(), probe) }

// identity is what a verdict holds for.
func identity() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var u unix.Utsname
	if err != nil || unix.Uname(&u) != nil {
		return ""
	}
	return strings.TrimSpace(string(boot)) + " " + unix.ByteSliceToString(u.Release[:])
}

// kept is the cache's form; an error is kept as its text.
type kept struct {
	For     string        `json:"for"`
	Usable  bool          `json:"usable"`
	Stage   string        `json:"stage"`
	Exit    string        `json:"exit"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Err     string        `json:"error,omitempty"`
	TSCkHz  int           `json:"tsc_khz"`
}

func cached(path, identity string, probe func() Verdict) Verdict {
	var k kept
	if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &k) == nil && k.For == identity && identity != "" {
		v := Verdict{Usable: k.Usable, Stage: k.Stage, Exit: k.Exit, Elapsed: k.Elapsed, TSCkHz: k.TSCkHz}
		if k.Err != "" {
			v.Err = errors.New(k.Err)
		}
		return v
	}
	v := probe()
	if v.Exit == "" || v.Exit == exitTimeout {
		return v // the device could not be opened, or the machine was busy: both may change
	}
	k = kept{For: identity, Usable: v.Usable, Stage: v.Stage, Exit: v.Exit, Elapsed: v.Elapsed, TSCkHz: v.TSCkHz}
	if v.Err != nil {
		k.Err = v.Err.Error()
	}
	keep(path, k)
	return v
}

// keep writes the cache. Without it the next caller asks again.
func keep(path string, k kept) {
	data, err := json.Marshal(k)
	if err != nil || os.MkdirAll(filepath.Dir(path), 0o755) != nil {
		return
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".kvm-*")
	if err != nil {
		return
	}
	_, err = f.Write(append(data, '\n'))
	if errors.Join(err, f.Close(), os.Rename(f.Name(), path)) != nil {
		os.Remove(f.Name())
	}
}

const exitTimeout = "TIMEOUT"
