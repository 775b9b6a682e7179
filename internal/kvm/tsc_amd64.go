package kvm

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// TSCkHz is the rate of this machine's time stamp counter, as KVM knows it, else
// as the kernel prints it, else as measured.
func TSCkHz() int {
	c := new(vcpu)
	defer c.close()
	if c.make(); c.tscKHz != 0 {
		return c.tscKHz
	}
	return measuredTSC()
}

func measuredTSC() int {
	info, err := os.ReadFile("/proc/cpuinfo")
	if khz := printedTSC(string(info)); err == nil && khz != 0 {
		return khz
	}
	return countTSC(20 * time.Millisecond)
}

// printedTSC is what /proc/cpuinfo says, if that is the counter's rate and not
// the CPU's current one.
func printedTSC(cpuinfo string) int {
	constant := false
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(key) == "flags" {
			constant = strings.Contains(value, " constant_tsc")
			break
		}
	}
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(key) != "cpu MHz" || !constant {
			continue
		}
		if mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
			return int(mhz * 1000)
		}
	}
	return 0
}

// rdtsc reads the counter; it is written in assembly.
func rdtsc() uint64

// countTSC counts for a while, against the clock that no one sets.
func countTSC(d time.Duration) int {
	start, from := time.Now(), rdtsc()
	unix.Poll(nil, int(d.Milliseconds()))
	ticks, took := rdtsc()-from, time.Since(start)
	return int(float64(ticks) / took.Seconds() / 1000)
}
