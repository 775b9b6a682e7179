package qemu_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ingot/internal/kvm"
	"ingot/internal/need"
	"ingot/internal/vmm"
	"ingot/internal/vmm/qemu"
)

// BenchmarkStart is the time until QEMU has made the machine and answers.
func BenchmarkStart(b *testing.B) {
	need.Root(b)
	need.QEMU(b)
	d := qemu.New(qemu.Config{KVM: kvm.Probe()})
	d.Facts()
	base := b.TempDir()
	if err := makeGuest(b.Context(), base); err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		dir := filepath.Join(base, "vm")
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		m, err := d.Start(b.Context(), vmm.Config{
			UID: "bench", Dir: dir, User: 64999, VCPU: 1, Memory: 128, Agent: true,
			Kernel: filepath.Join(base, "boot/vmlinux"), Initrd: filepath.Join(base, "boot/initrd"),
		})
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		b.StopTimer()
		m.Kill()
		m.Close()
		os.RemoveAll(dir)
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(took[len(took)*95/100].Microseconds())/1000, "ms-p95")
}
