package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
)

// TestRoom fills the pool: no microVM is let in any more, which says why; those
// that are there run on, and can be stopped, started and removed.
func TestRoom(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	uid := m.create(t, "early")
	m.await(t, uid, "running")
	pool := m.dir + "/containerd/pool"
	filler := pool + "/filler"
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(0)
	leave := func(mib int64) {
		t.Helper()
		for {
			var s unix.Statfs_t
			if err := unix.Statfs(pool, &s); err != nil {
				t.Fatal(err)
			}
			if int64(s.Bavail)*s.Bsize <= mib<<20 {
				return
			}
			const step = 4 << 20
			if err := unix.Fallocate(int(f.Fd()), 0, size, step); err != nil {
				t.Fatal(err)
			}
			size += step
		}
	}
	facts := func() (full, low string) {
		t.Helper()
		r, err := m.host.Facts(t.Context(), &emptypb.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Pool.Full, r.Pool.Low
	}
	if full, low := facts(); full != "" || low != "" {
		t.Errorf("at first: %q, %q", full, low)
	}
	large, disk := spec("large"), int32(1<<20) // 1 TiB
	large.RootVolume.SizeInMb = &disk
	_, err = m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: large})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "MiB left") {
		t.Errorf("create of a disk that the pool has no room for: %v", err)
	}
	leave(60)
	if full, low := facts(); full != "" || low == "" {
		t.Errorf("nearly full: %q, %q", full, low)
	}
	leave(20)
	if full, _ := facts(); full == "" {
		t.Error("full, and the host says nothing")
	}
	_, err = m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec("late")})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "ingot image prune") {
		t.Errorf("create: %v", err)
	}
	if n := len(m.list(t)); n != 1 {
		t.Errorf("%d microVMs are there", n)
	}
	if p := m.phase(t, uid); p != "running" {
		t.Errorf("the one that was there is %s", p)
	}
	f.Close()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	await(t, "the file system to give the room back", func() bool { full, _ := facts(); return full == "" })
	m.remove(t, m.create(t, "later"))
	m.remove(t, uid)
	m.expectNothing(t)
}

// TestRoomBeneath fills the file system that a sparse pool lies on, with data and
// with names, while the pool itself has room.
func TestRoomBeneath(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	need.Binary(t, "mkfs.ext4")
	disk := filepath.Join(t.TempDir(), "disk") // sparse, and so are the files on it
	m := newMachineOn(t, func(dir string) {
		out, err := exec.Command("sh", "-ec", "truncate -s 6G $0; mkfs.ext4 -q -N 14000 $0; mount -o loop $0 $1", disk, dir).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	})
	uid := m.create(t, "early")
	m.await(t, uid, "running")
	refused := func(words string) {
		t.Helper()
		r, err := m.host.Facts(t.Context(), &emptypb.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(r.Pool.Full, words) {
			t.Errorf("full: %q, want %q", r.Pool.Full, words)
		}
		_, err = m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec("late")})
		if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), words) {
			t.Errorf("create: %v", err)
		}
		if p := m.phase(t, uid); p != "running" {
			t.Errorf("the one that was there is %s", p)
		}
	}
	filler := m.dir + "/filler"
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(m.dir, &s); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(s.Bavail)*s.Bsize-4<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	refused("the file system beneath")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filler, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range s.Ffree - 500 {
		if err := os.Symlink("nowhere", filler+"/"+strconv.FormatUint(i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	refused("files only")
	if err := os.RemoveAll(filler); err != nil {
		t.Fatal(err)
	}
	m.remove(t, m.create(t, "later"))
	m.remove(t, uid)
	m.expectNothing(t)
}
