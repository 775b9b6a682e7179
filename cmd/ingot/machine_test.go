package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/image"
	"ingot/internal/link"
	"ingot/internal/need"
	"ingot/internal/vmm/vmmtest"
	"ingot/internal/wire"
)

// testMachine is a host that a test has for itself: this program's containerd
// and daemon, with the hollow hypervisor in QEMU's place, in namespaces in which
// nothing else runs. What the test leaves ends with it.
type testMachine struct {
	dir        string
	containerd *exec.Cmd
	daemon     *exec.Cmd
	conn       *grpc.ClientConn
	vms        v1alpha1.MicroVMClient
	host       ingotv1.HostClient
	images     *image.Store
	base       []string // what is there when there are no microVMs
}

const envMachine = "INGOT_TEST_MACHINE"

// onMachine runs the test that calls it again, as the first process of its own
// namespaces, and says there whether this is that run.
func onMachine(t *testing.T) bool {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Loop(t)
	if os.Getenv(envMachine) != "" {
		return true
	}
	_, below, _ := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	args := []string{"-test.run=^" + t.Name() + "$/" + below, "-test.v"}
	flag.Visit(func(f *flag.Flag) {
		if !strings.HasPrefix(f.Name, "test.") {
			args = append(args, "-"+f.Name+"="+f.Value.String())
		}
	})
	c := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	c.Env = append(os.Environ(), envMachine+"="+vmmtest.Hollow(t))
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// newMachine sets the host up and starts it.
func newMachine(t *testing.T) *testMachine {
	t.Helper()
	return newMachineOn(t, func(string) {})
}

// newMachineOn has the host's files in a directory that prepare has made ready.
func newMachineOn(t *testing.T, prepare func(dir string)) *testMachine {
	t.Helper()
	m := &testMachine{dir: t.TempDir()}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	prepare(m.dir)
	for _, err := range []error{
		unix.Mount("proc", "/proc", "proc", 0, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		link.Up("lo"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := link.EnsureBridge("br0"); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(os.Getenv(envMachine))
	if err := os.Symlink("hollow", filepath.Join(bin, "qemu-system-x86_64")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	m.configure(t, "memory-overcommit: 0\nvcpu-overcommit: 0\n") // hollow guests use neither
	m.startContainerd(t)
	t.Cleanup(func() {
		m.containerd.Process.Kill()
		m.containerd.Wait()
		unix.Unmount(m.dir+"/containerd/pool", unix.MNT_DETACH)
		log, _ := os.ReadFile(m.dir + "/daemon.log")
		for _, bug := range []string{"DATA RACE", "panic: ", "goroutine "} { // a guest's panic is none
			if i := bytes.Index(log, []byte(bug)); i >= 0 {
				t.Errorf("the daemon's log: %s", log[max(0, i-100):min(len(log), i+5000)])
			}
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", log[max(0, len(log)-12000):])
			log, _ = os.ReadFile(m.dir + "/containerd.log")
			t.Logf("containerd's log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	m.loadImages(t)
	var err error
	if m.conn, err = wire.Dial(wire.Target{Address: "127.0.0.1:9090", Insecure: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.conn.Close() })
	m.vms, m.host = v1alpha1.NewMicroVMClient(m.conn), ingotv1.NewHostClient(m.conn)
	m.startDaemon(t)
	t.Cleanup(func() { m.daemon.Process.Kill(); m.daemon.Wait() })
	if m.images, err = image.Open(t.Context(), image.Config{Socket: m.socket()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.images.Close() })
	// The first microVM unpacks images, which stay.
	uid := m.create(t, "first")
	m.await(t, uid, "running")
	m.remove(t, uid)
	m.base = m.things(t)
	return m
}

// configure writes the daemon's configuration, which its next start reads.
func (m *testMachine) configure(t testing.TB, more string) {
	t.Helper()
	config := fmt.Sprintf("insecure: true\ngrpc-endpoint: 127.0.0.1:9090\nbridge-name: br0\nstate-dir: %s/state\npool: %s/containerd\n", m.dir, m.dir)
	if err := os.WriteFile(m.dir+"/config.yaml", []byte(config+more), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m *testMachine) socket() string { return "/run/containerd/containerd.sock" }

func (m *testMachine) start(t testing.TB, log string, args ...string) *exec.Cmd {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(m.dir, log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := exec.Command("ingot", args...)
	c.Stdout, c.Stderr = f, f
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (m *testMachine) startContainerd(t testing.TB) {
	t.Helper()
	m.containerd = m.start(t, "containerd.log", "containerd", "--root", m.dir+"/containerd", "--pool-size", "512", "--volume-size", "16")
	await(t, "containerd", func() bool {
		out, err := exec.Command("ctr", "-n", "flintlock", "version").CombinedOutput()
		return err == nil && bytes.Contains(out, []byte("Server"))
	})
}

// startDaemon starts it and returns when it serves.
func (m *testMachine) startDaemon(t testing.TB) {
	t.Helper()
	m.daemon = m.start(t, "daemon.log", "host", "--config", m.dir+"/config.yaml")
	m.list(t)
}

// killDaemon ends it as a power cut would, and leaves what it started.
func (m *testMachine) killDaemon() {
	m.daemon.Process.Kill()
	m.daemon.Wait()
}

// loadImages gives containerd a kernel and a root image. Nobody boots them.
func (m *testMachine) loadImages(t *testing.T) {
	t.Helper()
	program, err := os.ReadFile(os.Getenv(envMachine))
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"kernel": "boot/vmlinux", "root": "sbin/init"} {
		path := filepath.Join(m.dir, name+".tar")
		if err := os.WriteFile(path, archive("test.local/"+name+":latest", file, program), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("ctr", "-n", "flintlock", "images", "import", "--local", path).CombinedOutput(); err != nil {
			t.Fatalf("import: %v\n%s", err, out)
		}
	}
}

// archive is an OCI archive (image-layout) of an image with one file.
func archive(ref, path string, data []byte) []byte {
	blobs := map[string][]byte{}
	add := func(data []byte) map[string]any {
		digest := fmt.Sprintf("%x", sha256.Sum256(data))
		blobs["blobs/sha256/"+digest] = data
		return map[string]any{"digest": "sha256:" + digest, "size": len(data)}
	}
	typed := func(d map[string]any, mediaType string) map[string]any { d["mediaType"] = mediaType; return d }
	encode := func(v any) []byte { b, _ := json.Marshal(v); return b }
	layer := tarOf(map[string][]byte{path: data})
	layerBlob := typed(add(layer), "application/vnd.oci.image.layer.v1.tar")
	config := add(encode(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{layerBlob["digest"]}},
	}))
	manifest := typed(add(encode(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": typed(config, "application/vnd.oci.image.config.v1+json"), "layers": []any{layerBlob},
	})), "application/vnd.oci.image.manifest.v1+json")
	manifest["annotations"] = map[string]string{"io.containerd.image.name": ref}
	blobs["index.json"] = encode(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})
	blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return tarOf(blobs)
}

func tarOf(files map[string][]byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))})
		w.Write(data)
	}
	w.Close()
	return b.Bytes()
}

func spec(name string) *types.MicroVMSpec {
	file := "boot/vmlinux"
	return &types.MicroVMSpec{
		Id: name, Namespace: "test", Vcpu: 1, MemoryInMb: 128,
		Kernel:     &types.Kernel{Image: "test.local/kernel:latest", Filename: &file},
		RootVolume: &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: ptr("test.local/root:latest")}},
		Interfaces: []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP}},
	}
}

func ptr[T any](v T) *T { return &v }

func (m *testMachine) create(t testing.TB, name string) (uid string) {
	t.Helper()
	r, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec(name)})
	if err != nil {
		t.Fatal(err)
	}
	return r.Microvm.Spec.GetUid()
}

// phase is empty once the microVM is gone.
func (m *testMachine) phase(t testing.TB, uid string) string {
	t.Helper()
	for _, vm := range m.list(t) {
		if vm.Spec.GetUid() == uid {
			return vm.Status.GetPhase()
		}
	}
	return ""
}

func (m *testMachine) list(t testing.TB) []*types.MicroVM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		r, err := m.vms.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return r.Microvm
		}
		if status.Code(err) != codes.Unavailable { // the daemon was killed
			t.Fatal(err)
		}
	}
}

func (m *testMachine) await(t testing.TB, uid, phase string) {
	t.Helper()
	var last *types.MicroVMStatus
	is := func() bool {
		last = nil
		for _, vm := range m.list(t) {
			if vm.Spec.GetUid() == uid {
				last = vm.Status
			}
		}
		return last.GetPhase() == phase
	}
	// One whose hypervisor was killed often waits for up to a minute.
	for deadline := time.Now().Add(90 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("microVM %s is not %s, but %v", uid, phase, last)
		}
	}
}

func (m *testMachine) remove(t testing.TB, uid string) {
	t.Helper()
	if _, err := m.vms.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: uid}, grpc.WaitForReady(true)); err != nil && !strings.Contains(err.Error(), "not found") {
		t.Fatal(err)
	}
	m.await(t, uid, "")
}

// await waits until something is so.
func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("wait for %s: no", what)
		}
	}
}

// things are all that microVMs are made of, as the kernel and containerd have
// them: a list that is the same whenever there are none.
func (m *testMachine) things(t testing.TB) []string {
	t.Helper()
	var all []string
	links, err := link.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		all = append(all, "link "+l.Name)
	}
	for _, pid := range m.hypervisors() {
		all = append(all, "process "+pid)
	}
	facts, err := m.images.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range facts.Leases {
		all = append(all, "lease "+l)
	}
	all = append(all, fmt.Sprintf("snapshots %d", facts.Snapshots), fmt.Sprintf("blobs %d", facts.Content))
	filepath.Walk(m.dir+"/state", func(path string, _ os.FileInfo, _ error) error {
		all = append(all, "file "+path)
		return nil
	})
	pool, _ := filepath.Glob(m.dir + "/containerd/pool/*/*")
	for _, path := range pool {
		all = append(all, "volume "+path)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		all = append(all, "mount "+strings.Fields(line)[4])
	}
	slices.Sort(all)
	return all
}

// hypervisors are the processes that run, without zombies.
func (m *testMachine) hypervisors() (pids []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err == nil && bytes.Contains(stat, []byte("(qemu-system-x86)")) && !bytes.Contains(stat, []byte(") Z ")) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// expectNothing finds what there was before the first microVM, and no more.
func (m *testMachine) expectNothing(t testing.TB) {
	t.Helper()
	var left []string
	for range 100 { // containerd collects what nothing refers to soon after
		left = nil
		base := slices.Clone(m.base)
		for _, thing := range m.things(t) {
			if i := slices.Index(base, thing); i >= 0 {
				base = slices.Delete(base, i, i+1)
			} else {
				left = append(left, thing)
			}
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("left behind: %s", strings.Join(left, "\n\t"))
}

// TestMachine is the harness's own: a microVM comes, is stopped, started, and goes.
func TestMachine(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	uid := m.create(t, "one")
	m.await(t, uid, "running")
	if _, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid}); err != nil {
		t.Error(err)
	}
	if p := m.phase(t, uid); p != "stopped" {
		t.Errorf("after stop it is %s", p)
	}
	if _, err := m.host.Start(t.Context(), &ingotv1.StartRequest{Uid: uid}); err != nil {
		t.Error(err)
	}
	m.await(t, uid, "running")
	if n := len(m.hypervisors()); n != 1 {
		t.Errorf("%d hypervisors", n)
	}
	m.remove(t, uid)
	m.expectNothing(t)
}
