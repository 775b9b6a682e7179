package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

var (
	kernelFiles = []file{{name: "boot/vmlinux", data: noise(100_000)}, {name: "boot/initrd", data: "an initrd"},
		{name: "boot/latest", link: "/boot/vmlinux"}, {name: "boot/out", link: "../../../../../../../../etc/passwd"}}
	rootFiles = []file{{name: "bin/app", data: "#!/bin/true\n"}, {name: "etc/version", data: "1"}}
)

func standard() Request {
	return Request{
		Kernel:  vm.File{Image: "kernel", Path: "boot/vmlinux"},
		Initrd:  &vm.File{Image: "kernel", Path: "boot/initrd"},
		Root:    vm.Volume{ID: "root", Image: "base"},
		Volumes: []vm.Volume{{ID: "data", Image: "base", ReadOnly: true}},
	}
}

func (l *lab) pushStandard(t testing.TB) {
	t.Helper()
	l.push(t, "kernel", kernelFiles)
	l.push(t, "base", rootFiles, []file{{name: "etc/version", data: "2"}})
}

func prepare(t testing.TB, s *Store, lease string, r Request) Prepared {
	t.Helper()
	p, err := s.Prepare(t.Context(), lease, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func run(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return string(out)
}

func TestPrepareAndRelease(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	const lease = "flintlock/ns1/vm1/01"
	var mu sync.Mutex
	last := map[string]Progress{}
	p, err := s.Prepare(t.Context(), lease, standard(), func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		if old := last[p.Image]; p.Offset < old.Offset {
			t.Errorf("progress went back: %v after %v", p, old)
		}
		last[p.Image] = p
	})
	if err != nil {
		t.Fatal(err)
	}
	for ref, p := range last {
		if p.Status != "done" || p.Total == 0 || p.Offset != p.Total {
			t.Errorf("last progress of %s: %+v", ref, p)
		}
	}
	want := vm.Process{Entrypoint: []string{"/bin/app"}, Args: []string{"-v"}, Env: map[string]string{"A": "b=c"}, Dir: "/srv", User: "7"}
	if d := cmp.Diff(want, p.Process); d != "" {
		t.Error(d)
	}
	if got, err := os.ReadFile(p.Kernel); err != nil || string(got) != kernelFiles[0].data {
		t.Errorf("kernel %s: %d bytes, %v", p.Kernel, len(got), err)
	}
	if got, err := os.ReadFile(p.Initrd); err != nil || string(got) != "an initrd" {
		t.Errorf("initrd %s: %q, %v", p.Initrd, got, err)
	}
	for id, path := range p.Volumes {
		run(t, "e2fsck", "-fn", path)
		if got := run(t, "debugfs", "-R", "cat /etc/version", path); !strings.HasSuffix(got, "2") {
			t.Errorf("volume %s: version %q", id, got)
		}
	}
	if len(p.Volumes) != 2 || p.Volumes["root"] == p.Volumes["data"] {
		t.Errorf("volumes: %v", p.Volumes)
	}
	if err := s.Record(t.Context(), lease, map[string]string{"dev.liquidmetal.flintlockd/uid": "01"}, []byte(`{"spec":1}`)); err != nil {
		t.Error(err)
	}
	l.checkHolds(t, s, lease)
	writeByte(t, p.Volumes["root"], 200<<20, 'x')
	if again := prepare(t, s, lease, standard()); cmp.Diff(p, again) != "" {
		t.Errorf("prepared again: %s", cmp.Diff(p, again))
	}
	if readByte(t, p.Volumes["root"], 200<<20) != 'x' {
		t.Error("preparing again lost what was written")
	}
	if err := s.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(t.Context(), lease); err != nil {
		t.Errorf("released twice: %v", err)
	}
	l.checkReleased(t, s, p)
}

// checkHolds looks with the command line that people use.
func (l *lab) checkHolds(t *testing.T, s *Store, lease string) {
	t.Helper()
	if ids, err := s.Leases(t.Context()); err != nil || !slices.Equal(ids, []string{lease}) {
		t.Errorf("leases: %v, %v", ids, err)
	}
	f, err := s.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// One kernel, two layers of base, two volumes.
	if f.Snapshots != 5 || len(f.Images) != 2 || f.ContentBytes == 0 {
		t.Errorf("facts: %+v", f)
	}
	if n, err := s.countSnapshots(t.Context(), "devmapper"); err != nil || n != 0 {
		t.Errorf("snapshots of a snapshotter that is not there: %d, %v", n, err)
	}
	recorded := 0
	err = s.Recorded(t.Context(), map[string]string{"dev.liquidmetal.flintlockd/uid": "01"}, func(_ map[string]string, data []byte) error {
		recorded++
		if string(data) != `{"spec":1}` {
			t.Errorf("record: %s", data)
		}
		return nil
	})
	if err != nil || recorded != 1 {
		t.Errorf("records: %d, %v", recorded, err)
	}
	if got := l.ctr(t, "leases", "ls"); len(got) != 1 || !strings.HasPrefix(got[0], lease) {
		t.Errorf("ctr leases ls: %q", got)
	}
	if got := strings.Join(l.ctr(t, "snapshots", "ls"), "\n"); !strings.Contains(got, lease+"/root") || !strings.Contains(got, lease+"/data") {
		t.Errorf("ctr snapshots ls: %s", got)
	}
	if got := strings.Join(l.ctr(t, "content", "ls"), "\n"); !strings.Contains(got, "dev.liquidmetal.flintlockd/uid=01") {
		t.Errorf("ctr content ls: %s", got)
	}
	info, err := s.client.SnapshotService(blockfile).Stat(t.Context(), lease+"/root")
	if err != nil || info.Labels["flintlock/owner-usage"] != "root" {
		t.Errorf("snapshot: %+v, %v", info, err)
	}
}

func (l *lab) checkReleased(t *testing.T, s *Store, p Prepared) {
	t.Helper()
	for _, path := range p.Volumes {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	f, err := s.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f.Snapshots != 3 || len(f.Leases) != 0 {
		t.Errorf("after release: %+v", f)
	}
	if got := l.ctr(t, "leases", "ls"); len(got) != 0 {
		t.Errorf("ctr leases ls: %q", got)
	}
	if got := l.ctr(t, "snapshots", "ls"); len(got) != 2 {
		t.Errorf("ctr snapshots ls: %q", got)
	}
	if got := strings.Join(l.ctr(t, "content", "ls"), "\n"); strings.Contains(got, "flintlockd") {
		t.Errorf("ctr content ls: %s", got)
	}
	files, err := filepath.Glob(filepath.Join(l.dir, "pool/blockfile/snapshots/*"))
	if err != nil || len(files) != 2 {
		t.Errorf("files in the pool: %v, %v", files, err)
	}
}

func writeByte(t *testing.T, path string, at int64, b byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{b}, at); err != nil {
		t.Fatal(err)
	}
}

func readByte(t *testing.T, path string, at int64) byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

// TestMistakes: each says what it is and names what is wrong.
func TestMistakes(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	closed := freePort(t)
	for name, c := range map[string]struct {
		change func(*Request)
		is     func(error) bool
		says   []string
	}{
		"unknown image":    {func(r *Request) { r.Root.Image = "nosuch" }, errdefs.IsNotFound, []string{l.registry + "/nosuch:latest"}},
		"unknown tag":      {func(r *Request) { r.Root.Image = "base:v9" }, errdefs.IsNotFound, []string{"base:v9"}},
		"missing file":     {func(r *Request) { r.Kernel.Path = "boot/nosuch" }, errdefs.IsInvalidArgument, []string{"boot/nosuch", "/kernel:latest"}},
		"no file":          {func(r *Request) { r.Kernel.Path = "" }, errdefs.IsInvalidArgument, []string{"/kernel:latest"}},
		"directory":        {func(r *Request) { r.Kernel.Path = "boot" }, errdefs.IsInvalidArgument, []string{"boot"}},
		"link out":         {func(r *Request) { r.Kernel.Path = "boot/out" }, errdefs.IsInvalidArgument, []string{"boot/out"}},
		"dots out":         {func(r *Request) { r.Kernel.Path = "../../../../../../../../etc/passwd" }, errdefs.IsInvalidArgument, []string{"etc/passwd"}},
		"no registry":      {func(r *Request) { r.Root.Image = closed + "/base" }, errdefs.IsUnavailable, []string{closed}},
		"bad reference":    {func(r *Request) { r.Root.Image = "Ba se" }, errdefs.IsInvalidArgument, []string{"Ba se"}},
		"volume twice":     {func(r *Request) { r.Volumes[0].ID = "root" }, errdefs.IsInvalidArgument, []string{"root"}},
		"volume unnamed":   {func(r *Request) { r.Volumes[0].ID = "" }, errdefs.IsInvalidArgument, []string{"volume"}},
		"volume imageless": {func(r *Request) { r.Volumes[0].Image = "" }, errdefs.IsInvalidArgument, []string{"data"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := standard()
			c.change(&r)
			_, err := s.Prepare(t.Context(), "flintlock/ns/mistake/01", r, nil)
			if !c.is(err) {
				t.Fatalf("got %v", err)
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not name %q", err, want)
				}
			}
		})
	}
	if ids, err := s.Leases(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("mistakes left leases: %v, %v", ids, err)
	}
	r := standard()
	r.Kernel.Path = "/boot/latest"
	if p := prepare(t, s, "flintlock/ns/link/01", r); !strings.HasSuffix(p.Kernel, "/boot/vmlinux") {
		t.Errorf("a link inside the image leads to %s", p.Kernel)
	}
}

// TestPresentImageNeedsNoRegistry: what is here is used without asking.
func TestPresentImageNeedsNoRegistry(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	prepare(t, l.open(t), "flintlock/ns/a/01", standard())
	s, err := Open(t.Context(), Config{Socket: l.dir + "/c.sock", Registry: l.registry, CAFile: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	prepare(t, s, "flintlock/ns/b/02", standard())
	// The volume's image as a kernel: unpacked anew, but not pulled.
	r := standard()
	r.Kernel = vm.File{Image: "base", Path: "bin/app"}
	prepare(t, s, "flintlock/ns/c/03", r)
}

// TestGrow: a volume becomes as large as asked, with the file system in it, and
// never smaller.
func TestGrow(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	for _, c := range []struct{ ask, get vm.MiB }{{700, 700}, {10, 256}, {0, 256}} {
		r := standard()
		r.Root.Size = c.ask
		p := prepare(t, s, fmt.Sprintf("flintlock/ns/grow/%d", c.ask), r)
		info, err := os.Stat(p.Volumes["root"])
		if err != nil || info.Size() != c.get.Bytes() {
			t.Errorf("asked for %d: %d bytes, %v", c.ask, info.Size(), err)
		}
		f, err := os.Open(p.Volumes["root"])
		if err != nil {
			t.Fatal(err)
		}
		if size, err := pool.Ext4Size(f); err != nil || size != c.get.Bytes() {
			t.Errorf("asked for %d: the file system has %d bytes, %v", c.ask, size, err)
		}
		f.Close()
		run(t, "e2fsck", "-fn", p.Volumes["root"])
	}
}

// TestPulledOnce: many who ask at the same time cause one pull; one of them
// giving up does not disturb the others.
func TestPulledOnce(t *testing.T) {
	l := newLab(t)
	l.push(t, "kernel", kernelFiles)
	l.push(t, "base", []file{{name: "big", data: noise(20 << 20)}})
	s := l.open(t)
	impatient, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		_, err := s.Prepare(impatient, "flintlock/ns/impatient/00", standard(), func(p Progress) { cancel() })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("impatient: %v", err)
		}
	})
	var mu sync.Mutex
	var most int64
	for i := range 8 {
		all.Go(func() {
			_, err := s.Prepare(t.Context(), fmt.Sprintf("flintlock/ns/vm/%d", i), standard(), func(p Progress) {
				mu.Lock()
				defer mu.Unlock()
				most = max(most, p.Offset)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if most > 21<<20 {
		t.Errorf("%d bytes were pulled", most)
	}
}

// A pull and a microVM that need the same image fetch it together, under one
// lease: there were two that gave up each other's.
func TestPullAndPrepareAtOnce(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	name, err := s.Resolve("base")
	if err != nil {
		t.Fatal(err)
	}
	waiters := func() int {
		s.pulls.mu.Lock()
		defer s.pulls.mu.Unlock()
		if c := s.pulls.calls[name+" "+blockfile]; c != nil {
			return len(c.waiters)
		}
		return 0
	}
	var all sync.WaitGroup
	var once sync.Once
	together := make(chan bool, 1)
	all.Go(func() {
		err := s.Pull(t.Context(), "base", Always, func(Progress) {
			once.Do(func() { // the fetch stands still as long as this does
				all.Go(func() {
					if _, err := s.Prepare(t.Context(), "flintlock/ns/vm/01", standard(), nil); err != nil {
						t.Error(err)
					}
				})
				deadline := time.Now().Add(10 * time.Second)
				for waiters() < 2 && time.Now().Before(deadline) {
					time.Sleep(time.Millisecond)
				}
				together <- waiters() == 2
			})
		})
		if err != nil {
			t.Error(err)
		}
	})
	all.Wait()
	if !<-together {
		t.Error("the microVM fetched the image by itself")
	}
}

// TestEndedPull: one that fails, that is cancelled or whose daemon is killed
// leaves no lease that holds what it has fetched.
func TestEndedPull(t *testing.T) {
	l := newLab(t)
	l.push(t, "base", []file{{name: "one", data: noise(8 << 20)}}, []file{{name: "two", data: noise(8<<20 + 1)}})
	s := l.open(t)
	none := func(after string) {
		t.Helper()
		var left []string
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if left = l.ctr(t, "leases", "ls"); len(left) == 0 {
				return
			}
		}
		t.Errorf("%s left %q", after, left)
	}
	if err := s.Pull(t.Context(), "nosuch", "", nil); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown image: %v", err)
	}
	none("a pull that failed")
	ctx, cancel := context.WithCancel(t.Context())
	err := s.Pull(ctx, "base", "", func(p Progress) {
		if p.Offset > 1<<20 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled one: %v", err)
	}
	none("a pull that was cancelled")
	if err := s.Pull(t.Context(), "base", "", nil); err != nil {
		t.Error(err)
	}
	none("a pull")
	if _, _, err := s.leaseForPull(t.Context(), "base "+blockfile); err != nil { // and then the daemon was killed
		t.Fatal(err)
	}
	if left := l.ctr(t, "leases", "ls"); len(left) != 1 {
		t.Errorf("leases in a pull: %q", left)
	}
	l.open(t)
	none("a killed daemon")
}

// TestKilledInPull: containerd dies in the middle of a pull. The store that was
// connected then goes on when it is back, and nothing is left over.
func TestKilledInPull(t *testing.T) {
	l := newLab(t)
	l.push(t, "kernel", kernelFiles)
	var layers [][]file
	for i := range 6 {
		layers = append(layers, []file{{name: fmt.Sprint("big", i), data: noise(8<<20 + i)}})
	}
	l.push(t, "base", layers...)
	s := l.open(t)
	var once sync.Once
	_, err := s.Prepare(t.Context(), "flintlock/ns/vm/01", standard(), func(p Progress) {
		if strings.Contains(p.Image, "base") && p.Offset > 20<<20 {
			once.Do(func() { l.kill(t) })
		}
	})
	if !errdefs.IsUnavailable(err) {
		t.Fatalf("prepare without containerd: %v", err)
	}
	l.start(t)
	p := prepare(t, s, "flintlock/ns/vm/01", standard())
	run(t, "e2fsck", "-fn", p.Volumes["root"])
	if err := s.Release(t.Context(), "flintlock/ns/vm/01"); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(l.dir, "pool/blockfile/snapshots/*"))
	if err != nil || len(files) != len(layers) {
		t.Errorf("files in the pool: %v, %v", files, err)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(l.dir+"/root/tmpmounts")) {
		t.Errorf("a mount was left: %v", err)
	}
}

// TestDeadRegistryDelaysNobody: one accepts and never answers.
func TestDeadRegistryDelaysNobody(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	for i := range 4 {
		waiting.Go(func() {
			r := standard()
			r.Root.Image = dead.Addr().String() + "/base"
			if _, err := s.Prepare(ctx, fmt.Sprintf("flintlock/ns/dead/%d", i), r, nil); !errors.Is(err, context.Canceled) && !errdefs.IsUnavailable(err) {
				t.Errorf("dead registry: %v", err)
			}
		})
	}
	conn, err := dead.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	prepare(t, s, "flintlock/ns/alive/01", standard())
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("the other one took %v", took)
	}
	if err := s.Release(t.Context(), "flintlock/ns/alive/01"); err != nil {
		t.Error(err)
	}
	cancel()
	waiting.Wait()
}

// TestPlainContainerd: a containerd without claims gives the same, step by step.
func TestPlainContainerd(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	r := standard()
	prepare(t, s, "flintlock/ns/first/00", r)
	volumes, err := r.volumes()
	if err != nil {
		t.Fatal(err)
	}
	found, err := s.ensureAll(t.Context(), r, volumes, nil)
	if err != nil {
		t.Fatal(err)
	}
	const lease = "flintlock/ns/plain/01"
	for range 2 {
		out, err := s.claimPlainly(t.Context(), request(lease, volumes, found))
		if err != nil {
			t.Fatal(err)
		}
		run(t, "e2fsck", "-fn", out.Paths[lease+"/root"])
	}
	for _, lease := range []string{lease, "flintlock/ns/first/00"} {
		if err := s.Release(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
	}
	l.checkReleased(t, s, Prepared{})
}
