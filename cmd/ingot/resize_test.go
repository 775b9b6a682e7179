package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/need"
	"ingot/internal/pool"
	"ingot/internal/vm"
)

// guestSizes asks the hollow guest how large its disks are.
func (m *testMachine) guestSizes(t testing.TB, uid string) string {
	t.Helper()
	said := m.ask(t, uid, "sizes")
	_, sizes, _ := strings.Cut(said[strings.LastIndex(said, "sizes "):], " ")
	return strings.TrimSpace(sizes)
}

// TestResize: a guest sees at once that its disk has grown, and none sees a size that
// was refused.
func TestResize(t *testing.T) {
	need.Binary(t, "resize2fs")
	need.Binary(t, "e2fsck")
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	one := spec("one")
	one.AdditionalVolumes = []*types.Volume{{Id: "data", Source: one.RootVolume.Source}}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: one})
	if err != nil {
		t.Fatal(err)
	}
	uid := r.Microvm.Spec.GetUid()
	m.await(t, uid, "running")
	resize := func(volume string, size int64) error {
		r, err := m.host.Resize(t.Context(), &ingotv1.ResizeRequest{Uid: uid, VolumeId: volume, SizeInMb: size})
		if err == nil && r.Later != "" {
			t.Errorf("%s to %d MiB: later: %s", volume, size, r.Later)
		}
		return err
	}
	const was = 16
	for what, c := range map[string]struct {
		err  error
		code codes.Code
	}{
		"smaller":          {resize("", was-1), codes.InvalidArgument},
		"no such volume":   {resize("none", 64), codes.InvalidArgument},
		"more than a pool": {resize("", 100_000), codes.ResourceExhausted},
		"more than a size": {resize("", 1<<40), codes.InvalidArgument},
	} {
		if status.Code(c.err) != c.code {
			t.Errorf("%s: %v", what, c.err)
		}
	}
	m.expectDisks(t, uid, was, was)
	for range 2 {
		if err := resize("root", 64); err != nil {
			t.Fatal(err)
		}
		m.expectDisks(t, uid, 64, was)
	}
	if err := resize("data", 32); err != nil {
		t.Fatal(err)
	}
	m.expectDisks(t, uid, 64, 32)
	m.killDaemon()
	m.startDaemon(t)
	m.await(t, uid, "running")
	m.expectDisks(t, uid, 64, 32)
	if err := resize("", 63); status.Code(err) != codes.InvalidArgument {
		t.Errorf("less than it has: %v", err)
	}
	m.expectDisks(t, uid, 64, 32)

	m.stop(t, uid)
	// What is no ext4 any more is no reason not to grow, and not to start.
	paths, _ := m.volumes(t, uid)
	f, err := os.OpenFile(paths[1], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, volume := range []string{"root", "data"} {
		if err := resize(volume, 96); err != nil {
			t.Fatal(err)
		}
	}
	m.resume(t, uid)
	m.expectDisks(t, uid, 96, 96)
	expectExt4(t, m, uid, 96)
	m.remove(t, uid)
	m.expectNothing(t)
}

// TestResizeLater: a hypervisor that can't tell its guest does not keep the size from
// being there at the next start.
func TestResizeLater(t *testing.T) {
	need.Binary(t, "resize2fs")
	need.Binary(t, "e2fsck")
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	rigid := spec("rigid")
	rigid.Kernel.Cmdline = map[string]string{"hollow.rigid": "1"}
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: rigid})
	if err != nil {
		t.Fatal(err)
	}
	uid := r.Microvm.Spec.GetUid()
	m.await(t, uid, "running")
	for range 2 {
		r, err := m.host.Resize(t.Context(), &ingotv1.ResizeRequest{Uid: uid, SizeInMb: 64})
		if err != nil || !strings.Contains(r.Later, "disks do not grow here") {
			t.Errorf("later: %q, %v", r.GetLater(), err)
		}
		// It may be forgotten with the status of a daemon that was killed.
		if got := r.GetMicrovm().GetStatus().GetVolumes()["root"].GetSizeInMb(); got != 16 && got != 0 {
			t.Errorf("%d MiB are shown", got)
		}
		m.killDaemon()
		m.startDaemon(t)
		m.await(t, uid, "running")
		if got := m.guestSizes(t, uid); got != fmt.Sprint(16<<20) {
			t.Errorf("the guest has %s", got)
		}
	}
	m.stop(t, uid)
	m.resume(t, uid)
	m.expectDisks(t, uid, 64)
	expectExt4(t, m, uid, 64)
	m.remove(t, uid)
	m.expectNothing(t)
}

func (m *testMachine) stop(t *testing.T, uid string) {
	t.Helper()
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
}

func (m *testMachine) resume(t *testing.T, uid string) {
	t.Helper()
	if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
		t.Fatal(err)
	}
	m.await(t, uid, "running")
}

// volumes are the paths of a microVM's disks, in order.
func (m *testMachine) volumes(t testing.TB, uid string) (paths []string, shown []int64) {
	t.Helper()
	for _, vm := range m.list(t) {
		if vm.Spec.GetUid() != uid {
			continue
		}
		for _, v := range append([]*types.Volume{vm.Spec.RootVolume}, vm.Spec.AdditionalVolumes...) {
			s := vm.Status.Volumes[v.Id]
			paths, shown = append(paths, s.GetMount().GetSource()), append(shown, s.GetSizeInMb())
		}
	}
	return paths, shown
}

// expectDisks looks at the disks as their files are, as the host shows them, and as
// the guest sees them.
func (m *testMachine) expectDisks(t testing.TB, uid string, mebibytes ...int64) {
	t.Helper()
	paths, shown := m.volumes(t, uid)
	if !slices.Equal(shown, mebibytes) {
		t.Errorf("the host shows %v MiB, want %v", shown, mebibytes)
	}
	seen := m.guestSizes(t, uid)
	want := ""
	for i, n := range mebibytes {
		want += fmt.Sprintf(" %d", n<<20)
		if info, err := os.Stat(paths[i]); err != nil || info.Size() != n<<20 {
			t.Errorf("disk %d: the file has %d bytes, want %d MiB: %v", i, info.Size(), n, err)
		}
	}
	if " "+seen != want {
		t.Errorf("the guest sees %s, want%s", seen, want)
	}
}

// expectExt4 looks at the root's file system.
func expectExt4(t *testing.T, m *testMachine, uid string, size vm.MiB) {
	t.Helper()
	paths, _ := m.volumes(t, uid)
	f, err := os.Open(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := pool.Ext4Size(f); err != nil || n != size.Bytes() {
		t.Errorf("the file system has %d bytes, want %d MiB: %v", n, size, err)
	}
	if out, err := exec.Command("e2fsck", "-fn", paths[0]).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
