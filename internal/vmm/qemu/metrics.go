package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ingot/internal/vmm"
)

// Metrics is a line of qemu.metrics.
type Metrics struct {
	At       time.Time     `json:"at"`
	CPU      time.Duration `json:"cpu_ns,omitempty"`
	Resident int64         `json:"resident_bytes,omitempty"`
	Exit     *vmm.Exit     `json:"exit,omitempty"`
}

func appendMetrics(dir string, m Metrics) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return appendLine(dir, metricsFile, line)
}

// note adds a line to qemu.log, which is for people: that it can't be written is
// no reason to fail.
func note(dir, format string, args ...any) {
	line := fmt.Sprintf("%s "+format, append([]any{time.Now().UTC().Format(time.RFC3339Nano)}, args...)...)
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
