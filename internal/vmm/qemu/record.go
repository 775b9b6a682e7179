package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// record is runtime.json: how to find the process again, and once it has ended,
// how.
type record struct {
	Format      int       `json:"format"`
	Driver      string    `json:"driver"`
	Version     string    `json:"version,omitempty"`
	Accelerator string    `json:"accelerator"`
	UID         string    `json:"uid"`
	PID         int       `json:"pid"`
	StartTime   uint64    `json:"start_time"` // clock ticks since the machine's start
	BootID      string    `json:"boot_id"`
	StartedAt   time.Time `json:"started_at"`
	ConsoleFrom int64     `json:"console_from"` // where this run's part of the console's log begins

	Sockets map[string]string `json:"sockets"` // by use, a file of the directory each
	Exit    *vmm.Exit         `json:"exit,omitempty"`
}

const recordFormat = 1

func readRecord(dir string) (record, error) {
	var r record
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("no microVM was started in %s: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		// A power cut may tear it. No process outlives that, and another one would
		// be found by its command line.
		return r, fmt.Errorf("read %s: %w: %w", filepath.Join(dir, recordFile), err, errdefs.ErrNotFound)
	}
	if r.Driver != Name {
		return r, fmt.Errorf("driver %s started it, in %s: %w", r.Driver, dir, errdefs.ErrNotFound)
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("read %s: format %d is not known to this version: %w", filepath.Join(dir, recordFile), r.Format, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

func (r record) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(dir, recordFile, append(data, '\n'))
}

// bootID names this run of the machine.
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// find opens the process of a record, if it still runs.
func (r record) find() (*process.Process, error) {
	if r.BootID != bootID() {
		return nil, fmt.Errorf("process %d was of an earlier run of this machine: %w", r.PID, errdefs.ErrNotFound)
	}
	return process.Find(r.PID, r.StartTime)
}

// Attach finds the microVM that was started in dir. A Machine of the same
// microVM must be closed before: QEMU talks to one at a time. QEMU is not asked: one
// that does not answer runs all the same, and may have to be killed.
func (d *Driver) Attach(_ context.Context, dir string) (vmm.Machine, error) {
	r, err := readRecord(dir)
	if errdefs.IsNotFound(err) {
		sweep(dir, filepath.Base(dir))
	}
	if err != nil {
		return nil, fmt.Errorf("attach to QEMU: %w", err)
	}
	if r.Exit != nil {
		return nil, &vmm.Ended{Exit: *r.Exit}
	}
	p, err := r.find()
	if errdefs.IsNotFound(err) {
		return nil, &vmm.Ended{Exit: d.conclude(dir, r)}
	}
	if err != nil {
		return nil, fmt.Errorf("attach to QEMU: %w", err)
	}
	return newMachine(d.Log, dir, r, p), nil
}

// conclude records the end of a microVM that nobody watched.
func (d *Driver) conclude(dir string, r record) vmm.Exit {
	exit := cause(dir, r, 0, false)
	if r.BootID != bootID() && exit.Detail == "no shutdown was reported" {
		exit.Cause, exit.Detail = vmm.Unknown, "this machine was restarted"
	}
	if err := finish(dir, r, exit); err != nil {
		d.Log.Warn("cannot record the end of a microVM", "uid", r.UID, "err", err)
	}
	return exit
}

// finish puts an end on record and takes away what only a running process needs.
func finish(dir string, r record, exit vmm.Exit) error {
	r.Exit = &exit
	removeAll(dir, pidFile, qmpSocket, consoleSocket, agentSocket)
	note(dir, "ended: %s (%s)", exit.Cause, exit.Detail)
	return errors.Join(r.write(dir), appendMetrics(dir, vmm.Metrics{At: exit.At, Exit: &exit}))
}

// sweep ends a QEMU that an earlier process of ours started, and that has no record.
// It is known by its command line, which was written down before; where that is lost,
// too, by the name that it was given, if one is told.
func sweep(dir, name string) {
	cfg, err := os.ReadFile(filepath.Join(dir, cfgFile))
	want := strings.ReplaceAll(string(cfg), "\n", "\x00")
	ours := func(cmdline []byte) bool { return string(cmdline) == want }
	if errors.Is(err, fs.ErrNotExist) && name != "" {
		words := []byte("\x00-name\x00" + name + "\x00-nodefaults\x00")
		ours = func(cmdline []byte) bool { return bytes.Contains(cmdline, words) }
	} else if err != nil {
		return
	}
	matches, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range matches {
		if got, err := os.ReadFile(path); err != nil || !ours(got) {
			continue
		}
		var pid int
		fmt.Sscanf(path, "/proc/%d/", &pid)
		p, err := process.Find(pid, 0)
		if err != nil {
			continue
		}
		// Once more, now that it is held.
		if got, err := os.ReadFile(path); err == nil && ours(got) {
			p.Signal(unix.SIGKILL)
			p.Wait()
		}
		p.Close()
	}
}
