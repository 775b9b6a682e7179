package qemu

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
)

// event is what QEMU writes to the events file.
type event struct {
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"`
	} `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// tailSize is how much of a log's end is looked at: a panic's report, with its
// registers and its stack, is shorter.
const tailSize = 64 << 10

// cause says how a microVM ended, from what it left: QEMU's last event, the end
// of the console, and the process's status where its parent is us. Nobody needs
// to have been connected.
func cause(dir string, r record, status unix.WaitStatus, child bool) vmm.Exit {
	last, panicked := lastEvents(filepath.Join(dir, eventsFile))
	exit := vmm.Exit{At: time.Now(), Detail: last.Data.Reason}
	if last.Timestamp.Seconds != 0 {
		exit.At = time.Unix(last.Timestamp.Seconds, last.Timestamp.Microseconds*1000)
	}
	switch {
	case panicked || last.Data.Reason == "guest-panic":
		exit.Cause, exit.Detail = vmm.Panic, panicLine(dir, r)
	case last.Data.Reason == "guest-shutdown":
		exit.Cause = vmm.PowerOff
	case last.Data.Reason == "guest-reset":
		// With panic=-1 on its command line a kernel that gives up restarts at
		// once, and most have no driver to tell QEMU why.
		if exit.Cause, exit.Detail = vmm.Panic, panicLine(dir, r); exit.Detail == "" {
			exit.Cause, exit.Detail = vmm.Reboot, last.Data.Reason
		}
	case last.Data.Reason == "host-signal":
		exit.Cause = vmm.Killed
		exit.Detail = lastLine(filepath.Join(dir, stderrFile), "signal: terminated")
	case last.Data.Reason == "host-qmp-quit":
		exit.Cause = vmm.Stopped
	case child && status.Signaled() && status.Signal() == unix.SIGKILL:
		exit.Cause, exit.Detail = vmm.Killed, "signal: killed"
	case child && status.Signaled():
		exit.Cause = vmm.Error
		exit.Detail = lastLine(filepath.Join(dir, stderrFile), "signal: "+status.Signal().String())
	case child && status.ExitStatus() != 0:
		exit.Cause = vmm.Error
		exit.Detail = lastLine(filepath.Join(dir, stderrFile), fmt.Sprintf("exit status %d", status.ExitStatus()))
	default:
		// No word of an end. A QEMU that fails says why; one that is killed can't.
		exit.Cause, exit.Detail = vmm.Killed, "no shutdown was reported"
		if line := lastLine(filepath.Join(dir, stderrFile), ""); line != "" {
			exit.Cause, exit.Detail = vmm.Error, line
		}
	}
	return exit
}

// lastEvents is the last event that speaks of an end, and whether the guest
// reported a panic.
func lastEvents(path string) (last event, panicked bool) {
	for line := range bytes.Lines(tail(path, 0, tailSize)) {
		var e event
		if json.Unmarshal(line, &e) != nil {
			continue
		}
		switch e.Event {
		case "SHUTDOWN":
			last = e
		case "GUEST_PANICKED":
			panicked = true
		}
	}
	return last, panicked
}

// panicLine is the kernel's last words on the console of this run.
func panicLine(dir string, r record) string {
	text := tail(filepath.Join(dir, stdoutFile), r.ConsoleFrom, tailSize)
	i := bytes.LastIndex(text, []byte("Kernel panic - "))
	if i < 0 {
		return ""
	}
	line, _, _ := bytes.Cut(text[i:], []byte("\n"))
	return strings.TrimSpace(string(line))
}

// lastLine is a log's last line, or what else to say if it has none.
func lastLine(path, otherwise string) string {
	text := strings.TrimSpace(string(tail(path, 0, 4096)))
	if text == "" {
		return otherwise
	}
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// removeAll removes files of a directory; some may not be there.
func removeAll(dir string, names ...string) {
	for _, name := range names {
		os.Remove(filepath.Join(dir, name))
	}
}
