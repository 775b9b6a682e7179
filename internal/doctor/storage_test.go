package doctor_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
	"ingot/internal/need"
	"ingot/internal/pool"
)

func TestDisk(t *testing.T) {
	needs(t)
	dir := t.TempDir()
	p := doctor.Patient{Dir: filepath.Join(dir, "not", "yet")}
	there := p
	there.Exists = true
	for _, c := range []struct {
		options         string
		fresh, existing doctor.Status
		words           string
	}{
		{"size=4g", doctor.Pass, doctor.Pass, "4096 MiB are free in " + dir},
		{"size=1g", doctor.Fail, doctor.Warn, "only 1024 MiB are free in " + dir + ": 3072 are needed"},
		{"size=64m", doctor.Fail, doctor.Fail, "only 64 MiB are free"},
		{"size=4g,nr_inodes=5000", doctor.Fail, doctor.Warn, "more files fit into " + dir},
		{"size=4g,nr_inodes=500", doctor.Fail, doctor.Fail, "more files fit into " + dir},
		{"ro", doctor.Fail, doctor.Fail, "read-only"},
	} {
		t.Run(c.options, func(t *testing.T) {
			options, flags := c.options, uintptr(0)
			if options == "ro" {
				options, flags = "size=4g", unix.MS_RDONLY
			}
			mount(t, "tmpfs", dir, "tmpfs", flags, options)
			expect(t, "disk", p, c.fresh, c.words)
			expect(t, "disk", there, c.existing, c.words)
		})
	}
}

func TestReflinkAndLoop(t *testing.T) {
	needs(t)
	need.Loop(t)
	need.Binary(t, "mkfs.xfs")
	dir := t.TempDir()
	p := doctor.Patient{Dir: filepath.Join(dir, "not", "yet"), Hosts: 2}
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=4g")
	expect(t, "reflink", p, doctor.Pass, "each host gets an XFS in a sparse file")
	expect(t, "loop", p, doctor.Pass, "are free")

	made, err := pool.Open(t.Context(), dir, pool.Options{Size: pool.MinSize})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(made.Path(), unix.MNT_DETACH) })
	can := doctor.Patient{Dir: made.Path(), Hosts: 2}
	expect(t, "reflink", can, doctor.Pass, "can share blocks")
	expect(t, "loop", can, doctor.Pass, "not needed")
	if left, _ := os.ReadDir(made.Path()); len(left) != 0 {
		t.Errorf("looking left %v", left)
	}

	// A container's /dev, which the kernel makes no nodes in.
	mount(t, "tmpfs", "/dev", "tmpfs", 0, "")
	if err := unix.Mknod("/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	mend(t, expect(t, "loop", p, doctor.Fail, "/dev/loop-control is missing"), p)
	sh(t, "rm /dev/loop[0-9]*")
	mend(t, expect(t, "loop", p, doctor.Fail, "0 loop devices are free: 2 are needed"), p)
	other, err := pool.Open(t.Context(), filepath.Join(dir, "other"), pool.Options{Size: pool.MinSize})
	if err != nil {
		t.Fatalf("with what was mended: %v", err)
	}
	unix.Unmount(other.Path(), unix.MNT_DETACH)
}

// The packages that `make` installs are those that the check looks for.
func TestPackagesAreTheScripts(t *testing.T) {
	b, err := os.ReadFile("../../scripts/packages")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "\nrun=\"")
	run, _, _ := strings.Cut(after, "\"")
	if got := strings.Join(doctor.Packages(), " "); got != run {
		t.Errorf("the check looks for %q, scripts/packages installs %q", got, run)
	}
}
