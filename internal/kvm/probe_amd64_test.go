package kvm

import (
	"strings"
	"testing"
	"time"

	"ingot/internal/need"
)

func TestProbe(t *testing.T) {
	for range 20 {
		v := probe()
		if v.Usable != (v.Err == nil) || v.Usable != (v.Reason() == "") {
			t.Errorf("it contradicts itself: %+v", v)
		}
		if v.Elapsed > 2*budget {
			t.Errorf("it took %v", v.Elapsed)
		}
		if v.TSCkHz < 100_000 {
			t.Errorf("TSC at %d kHz", v.TSCkHz)
		}
	}
}

func TestProbeEndsInTime(t *testing.T) {
	need.KVMDevice(t)
	c := new(vcpu)
	defer c.close()
	if err := c.make(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var v Verdict
	c.run(&v, time.Nanosecond) // expired before it began, or caught in the middle
	if took := time.Since(start); took > time.Second {
		t.Errorf("it took %v: %+v", took, v)
	}
}

func TestTSC(t *testing.T) {
	if got := TSCkHz(); got < 100_000 || got > 10_000_000 {
		t.Errorf("TSC at %d kHz", got)
	}
	counted, told := countTSC(50*time.Millisecond), TSCkHz()
	if diff := counted - told; diff > told/20 || diff < -told/20 {
		t.Errorf("counted %d kHz, told %d kHz", counted, told)
	}
	const info = "processor : 0\ncpu MHz\t\t: 2596.140\nflags\t\t: fpu tsc constant_tsc\n"
	if got := printedTSC(info); got != 2596140 {
		t.Errorf("got %d", got)
	}
	if got := printedTSC(strings.Replace(info, "constant_tsc", "", 1)); got != 0 {
		t.Errorf("got %d from a rate that changes", got)
	}
}
