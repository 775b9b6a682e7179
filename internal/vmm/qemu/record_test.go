package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ingot/internal/kvm"
	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// bystander is a process that is not ours to touch.
func bystander(t *testing.T) *exec.Cmd {
	t.Helper()
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	return c
}

func TestAttachDoesNotTrustANumber(t *testing.T) {
	for name, change := range map[string]func(*record){
		"another process of that number": func(r *record) { r.StartTime++ },
		"an earlier run of this machine": func(r *record) { r.BootID = "another" },
		"no process of that number":      func(r *record) { r.PID = 1 << 22 },
	} {
		t.Run(name, func(t *testing.T) {
			other := bystander(t)
			start, err := process.StartTime(other.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			r := record{Format: recordFormat, Driver: Name, PID: other.Process.Pid, StartTime: start, BootID: bootID()}
			change(&r)
			if err := r.write(dir); err != nil {
				t.Fatal(err)
			}
			_, err = New(Config{}).Attach(t.Context(), dir)
			var ended *vmm.Ended
			if !errors.As(err, &ended) {
				t.Errorf("attach: %v", err)
			}
			if _, err := process.StartTime(other.Process.Pid); err != nil {
				t.Errorf("the other process: %v", err)
			}
		})
	}
}

func TestAttachEndsWhatWasNotRecorded(t *testing.T) {
	dir := t.TempDir()
	orphan := exec.Command("sleep", "1001.25")
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	other := bystander(t)
	if err := os.WriteFile(filepath.Join(dir, cfgFile), []byte("sleep\n1001.25\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{}).Attach(t.Context(), dir); !errdefs.IsNotFound(err) {
		t.Errorf("attach: %v", err)
	}
	if _, err := process.StartTime(orphan.Process.Pid); !errdefs.IsNotFound(err) {
		t.Error("the orphan lives")
	}
	if _, err := process.StartTime(other.Process.Pid); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

func TestCause(t *testing.T) {
	shutdown := func(reason string) string {
		return fmt.Sprintf(`{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "SHUTDOWN", "data": {"guest": true, "reason": %q}}`, reason)
	}
	const killed, aborted, exited = unix.WaitStatus(unix.SIGKILL), unix.WaitStatus(unix.SIGABRT), unix.WaitStatus(1 << 8)
	const panic = "[    2.4] Kernel panic - not syncing: sysrq\r\n[    2.5] CPU: 0\r\n"
	for name, c := range map[string]struct {
		events, console, stderr string
		from                    int64
		status                  unix.WaitStatus
		child                   bool
		want                    vmm.Exit
	}{
		"power off":        {events: shutdown("guest-shutdown"), want: vmm.Exit{Cause: vmm.PowerOff, Detail: "guest-shutdown"}},
		"reset":            {events: shutdown("guest-reset"), want: vmm.Exit{Cause: vmm.Reboot, Detail: "guest-reset"}},
		"panic, reset":     {events: shutdown("guest-reset"), console: panic, want: vmm.Exit{Cause: vmm.Panic, Detail: "Kernel panic - not syncing: sysrq"}},
		"older panic":      {events: shutdown("guest-reset"), console: panic, from: int64(len(panic)), want: vmm.Exit{Cause: vmm.Reboot, Detail: "guest-reset"}},
		"panic told":       {events: shutdown("guest-panic"), want: vmm.Exit{Cause: vmm.Panic}},
		"quit":             {events: shutdown("host-qmp-quit"), want: vmm.Exit{Cause: vmm.Stopped, Detail: "host-qmp-quit"}},
		"terminated":       {events: shutdown("host-signal"), stderr: "qemu: terminating on signal 15 from pid 1\n", want: vmm.Exit{Cause: vmm.Killed, Detail: "qemu: terminating on signal 15 from pid 1"}},
		"killed, child":    {status: killed, child: true, want: vmm.Exit{Cause: vmm.Killed, Detail: "signal: killed"}},
		"killed, unseen":   {want: vmm.Exit{Cause: vmm.Killed, Detail: "no shutdown was reported"}},
		"aborted, child":   {status: aborted, child: true, stderr: "a\nassertion failed\n", want: vmm.Exit{Cause: vmm.Error, Detail: "assertion failed"}},
		"exited, child":    {status: exited, child: true, want: vmm.Exit{Cause: vmm.Error, Detail: "exit status 1"}},
		"complained, then": {stderr: "out of memory\n", want: vmm.Exit{Cause: vmm.Error, Detail: "out of memory"}},
		"broken events":    {events: "{\n" + shutdown("guest-shutdown") + "\n{\"eve", want: vmm.Exit{Cause: vmm.PowerOff, Detail: "guest-shutdown"}},
	} {
		dir := t.TempDir()
		for file, text := range map[string]string{eventsFile: c.events, stdoutFile: c.console, stderrFile: c.stderr} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got := cause(dir, record{ConsoleFrom: c.from}, c.status, c.child)
		if strings.Contains(c.events, "SHUTDOWN") && !got.At.Equal(time.Unix(5, 7000)) {
			t.Errorf("%s: at %v, not at the event's time", name, got.At)
		}
		got.At = time.Time{}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestWords(t *testing.T) {
	for want, v := range map[string]kvm.Verdict{
		"console=ttyS0 reboot=t": {},
		"console=ttyS0 reboot=t tsc_early_khz=5 tsc=reliable no_timer_check": {TSCkHz: 5},
	} {
		if got := strings.Join(New(Config{KVM: v}).words(), " "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := New(Config{KVM: kvm.Verdict{Usable: true, TSCkHz: 5}}).words(); len(got) != 2 {
		t.Errorf("with KVM: %q", got)
	}
}

func TestFacts(t *testing.T) {
	d := New(Config{Binary: "/nonexistent/qemu"})
	if f := d.Facts(); f.Available || f.Reason == "" || f.Accelerator != "tcg" {
		t.Errorf("without QEMU: %+v", f)
	}
	if _, err := d.Start(context.Background(), vmm.Config{Dir: t.TempDir()}); !errdefs.IsUnavailable(err) {
		t.Errorf("start without QEMU: %v", err)
	}
}

func TestTornRecordIsNone(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "torn": `{"format": 1, "dri`} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := New(Config{}).Attach(t.Context(), dir); !errdefs.IsNotFound(err) {
				t.Errorf("attach: %v", err)
			}
			if err := vacant(dir); err != nil {
				t.Errorf("start: %v", err)
			}
		})
	}
}

// The daemon was killed between making the process and writing its record, and
// the record of an earlier run is still there.
func TestStartFindsAStrayBehindAnOldRecord(t *testing.T) {
	stray := bystander(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, cfgFile), []byte("sleep\n1000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := record{Format: recordFormat, Driver: Name, PID: 1 << 22, BootID: bootID(), Exit: &vmm.Exit{Cause: vmm.PowerOff}}
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	if err := vacant(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := process.StartTime(stray.Process.Pid); err == nil {
		t.Error("the stray still runs")
	}
}

// All of the directory was lost, and what runs is known by its name alone.
func TestAttachEndsWhatWasLost(t *testing.T) {
	const uid = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
	lost := exec.Command("sh", "-c", "sleep 1000; true", "-name", uid, "-nodefaults")
	lost.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := lost.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(-lost.Process.Pid, syscall.SIGKILL); lost.Wait() })
	other := bystander(t)
	dir := filepath.Join(t.TempDir(), uid)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := vacant(dir); err != nil { // does not look for it
		t.Fatal(err)
	}
	if _, err := process.StartTime(lost.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{}).Attach(t.Context(), dir); !errdefs.IsNotFound(err) {
		t.Errorf("attach: %v", err)
	}
	if _, err := process.StartTime(lost.Process.Pid); !errdefs.IsNotFound(err) {
		t.Errorf("what was lost runs: %v", err)
	}
	if _, err := process.StartTime(other.Process.Pid); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

// There is no descriptor left to hold a new process by.
func TestHoldLeavesNoChild(t *testing.T) {
	child, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	held := make(chan error, 1)
	go func() {
		_, err := hold(child)
		held <- err
	}()
	select {
	case err = <-held:
	case <-time.After(10 * time.Second):
		err = errors.New("it waits for a child that nobody ends")
	}
	unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	if !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	if _, err := process.StartTime(child.Pid); !errdefs.IsNotFound(err) {
		t.Errorf("the child lives: %v", err)
		unix.Kill(child.Pid, unix.SIGKILL)
	}
}

func TestFactsAskAgain(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "qemu")
	d := New(Config{Binary: binary})
	if f := d.Facts(); f.Available {
		t.Fatalf("without QEMU: %+v", f)
	}
	if err := os.WriteFile(binary, []byte("#!/bin/sh\necho QEMU emulator version 1.2.3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if f := d.Facts(); !f.Available || f.Version != "1.2.3" {
		t.Errorf("once it is there: %+v", f)
	}
}
