package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ingot/internal/vmm"
)

// Metrics reads what the process uses, and appends it to qemu.metrics.
func (m *machine) Metrics(context.Context) (vmm.Metrics, error) {
	metrics := vmm.Metrics{At: time.Now()}
	var err error
	if metrics.CPU, err = m.p.CPUTime(); err == nil {
		metrics.Resident, err = m.p.Resident()
	}
	if err != nil {
		return metrics, fmt.Errorf("measure QEMU: %w", err)
	}
	return metrics, appendMetrics(m.dir, metrics)
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
