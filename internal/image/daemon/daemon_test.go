package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"

	"ingot/internal/pool"
)

// TestMain runs the tests in a mount namespace of their own, so that no mount
// and no loop device outlives them however they end.
func TestMain(m *testing.M) {
	if os.Getenv("DAEMON_TEST_INSIDE") != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	again := exec.Command("/proc/self/exe", append(os.Args[1:], "-test.root")...)
	again.Env = append(os.Environ(), "DAEMON_TEST_INSIDE=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := again.Run(); err != nil && again.ProcessState == nil {
		os.Exit(1)
	}
	os.Exit(again.ProcessState.ExitCode())
}

func openPool(t testing.TB) string {
	t.Helper()
	needs(t, "mkfs.xfs", "mkfs.ext4", "debugfs")
	dir := t.TempDir()
	p, err := pool.Open(t.Context(), dir, pool.Options{Size: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(p.Path(), syscall.MNT_DETACH) })
	return p.Path()
}

func openTest(t testing.TB, root string) *blockfile {
	t.Helper()
	b, err := openBlockfile(t.Context(), root, 64)
	if err != nil {
		t.Fatal(err)
	}
	b.alive = func(string) bool { return false }
	return b
}

// TestSnapshotter holds the snapshotter to containerd's suite, which compares
// whole directories and therefore does not like lost+found.
func TestSnapshotter(t *testing.T) {
	dir := openPool(t)
	testsuite.SnapshotterSuite(t, "blockfile", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		b, err := openBlockfile(ctx, filepath.Join(dir, filepath.Base(filepath.Dir(root))), 64)
		if err != nil {
			return nil, nil, err
		}
		if out, err := exec.Command("debugfs", "-w", "-R", "rmdir lost+found", b.scratch).CombinedOutput(); err != nil {
			return nil, nil, fmt.Errorf("%w: %s", err, out)
		}
		b.alive = func(string) bool { return false }
		return b, b.Close, nil
	})
}

// TestReopen: what a snapshot is outlives the process, and a file that was
// being made when the machine stopped does not.
func TestReopen(t *testing.T) {
	root := filepath.Join(openPool(t), "blockfile")
	b := openTest(t, root)
	ctx := t.Context()
	if _, err := b.Prepare(ctx, "active", ""); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(ctx, "base", "active", snapshots.WithLabels(map[string]string{"a": "b"})); err != nil {
		t.Fatal(err)
	}
	mounts, err := b.Prepare(ctx, "vm", "base")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.View(ctx, "view", "base"); err != nil {
		t.Fatal(err)
	}
	torn := filepath.Join(root, "snapshots", "999")
	if err := os.WriteFile(torn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again := openTest(t, root)
	if _, err := os.Stat(torn); !os.IsNotExist(err) {
		t.Errorf("the torn file is still there: %v", err)
	}
	info, err := again.Stat(ctx, "base")
	if err != nil || info.Kind != snapshots.KindCommitted || info.Labels["a"] != "b" {
		t.Errorf("base: %+v, %v", info, err)
	}
	if found, err := again.Mounts(ctx, "vm"); err != nil || found[0].Source != mounts[0].Source {
		t.Errorf("vm: %v, %v", found, err)
	}
	if _, err := again.Prepare(ctx, "vm2", "base"); err != nil {
		t.Errorf("a name was used twice: %v", err)
	}
	if err := again.Remove(ctx, "base"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed a parent: %v", err)
	}
}

// TestUsage: a clone costs nothing until it is written to.
func TestUsage(t *testing.T) {
	b := openTest(t, filepath.Join(openPool(t), "blockfile"))
	ctx := t.Context()
	mounts, err := b.Prepare(ctx, "active", "")
	if err != nil {
		t.Fatal(err)
	}
	if u, err := b.Usage(ctx, "active"); err != nil || u.Size != 0 {
		t.Errorf("a clone takes %d bytes, %v", u.Size, err)
	}
	f, err := os.OpenFile(mounts[0].Source, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 1<<20), 32<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if u, err := b.Usage(ctx, "active"); err != nil || u.Size < 1<<20 || u.Size > 2<<20 {
		t.Errorf("after 1 MiB was written it takes %d bytes, %v", u.Size, err)
	}
}
