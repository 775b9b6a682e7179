package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"ingot/internal/vmm"
)

// Metrics reads what the process uses, and appends it to qemu.metrics.
func (m *machine) Metrics(context.Context) (vmm.Metrics, error) {
	metrics := vmm.Metrics{At: time.Now()}
	var err error
	if metrics.CPU, err = cpuTime(m.r.PID); err == nil {
		metrics.Resident, err = resident(m.r.PID)
	}
	if err != nil {
		return metrics, fmt.Errorf("measure QEMU: %w", err)
	}
	return metrics, appendMetrics(m.dir, metrics)
}

// cpuTime is how long a process has run, in user and kernel mode.
func cpuTime(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	const perSecond = 100 // USER_HZ, the same wherever Go runs
	return time.Duration(ticks) * time.Second / perSecond, nil
}

// resident is how much memory a process holds.
func resident(pid int) (int64, error) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return 0, fmt.Errorf("read /proc/%d/statm: %d fields", pid, len(fields))
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	return pages * int64(os.Getpagesize()), err
}

func appendMetrics(dir string, m vmm.Metrics) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return appendLine(dir, metricsFile, line)
}

// note adds a line to qemu.log, which is for people: that it can't be written is
// no reason to fail.
func note(dir, format string, args ...any) {
	line := time.Now().UTC().Format(time.RFC3339Nano) + " " + fmt.Sprintf(format, args...)
	appendLine(dir, logFile, []byte(line))
}

func appendLine(dir, name string, line []byte) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(append(line, '\n')); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
