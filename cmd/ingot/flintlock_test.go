package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/oklog/ulid/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"ingot/internal/link"
)

// predecessor lays down on a test's machine what flintlock 0.11 leaves there, by the
// clients and calls that flintlock uses: leases, snapshots and blobs in containerd,
// taps, the state directory, and processes with the command lines that it gives.
// There is no device mapper here: volumes are blockfile's snapshots, at paths that
// the records name as they would name a device.
type predecessor struct {
	m      *testMachine
	client *containerd.Client
	ctx    context.Context
	chains map[string]string // by image and snapshotter's use: the parents of snapshots
}

func newPredecessor(t *testing.T, m *testMachine) *predecessor {
	t.Helper()
	c, err := containerd.New(m.socket(), containerd.WithDefaultNamespace("flintlock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	f := &predecessor{m: m, client: c, ctx: t.Context(), chains: map[string]string{}}
	for _, name := range []string{"kernel", "root"} {
		i, err := c.GetImage(f.ctx, "test.local/"+name+":latest")
		if err != nil {
			t.Fatal(err)
		}
		layers, err := i.RootFS(f.ctx)
		if err != nil {
			t.Fatal(err)
		}
		f.chains[name] = identity.ChainID(layers).String()
	}
	return f
}

// laid is a microVM of flintlock's.
type laid struct {
	f                   *predecessor
	uid, name, provider string
	dir, lease          string
	eth0, eth1          string // taps
	root, kernel        string // where the snapshots are
	record              map[string]any
	version             int
	process             *exec.Cmd
	ended               chan struct{} // closed once the process's status is known
}

// lay lays down a microVM that runs, or that would if it were started.
func (f *predecessor) lay(t *testing.T, name, provider string) *laid {
	t.Helper()
	uid := ulid.Make().String()
	v := &laid{
		f: f, uid: uid, name: name, provider: provider, lease: "flintlock/test/" + name + "/" + uid,
		dir:  filepath.Join(f.m.dir, "state/vm/test", name, uid),
		eth0: "fltap" + digest.FromString(uid + "0").Encoded()[:7],
		eth1: "fltap" + digest.FromString(uid + "1").Encoded()[:7],
	}
	if _, err := f.client.LeasesService().Create(f.ctx, leases.WithID(v.lease)); err != nil {
		t.Fatal(err)
	}
	v.root = v.snapshot(t, "blockfile", "root", f.chains["root"])
	v.kernel = v.snapshot(t, "native", "kernel", f.chains["kernel"])
	for name, bridge := range map[string]string{v.eth0: "", v.eth1: "br0"} {
		if _, err := link.EnsureTap(name, link.Tap{Bridge: bridge}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	v.record = v.newRecord()
	v.write(t, provider+".stdout", "earlier\n")
	v.write(t, provider+".stderr", "")
	v.write(t, provider+".log", "")
	if provider == "firecracker" {
		v.write(t, "metadata.json", `{"latest": {"user-data": "secret"}}`)
		v.write(t, "firecracker.metrics", `{"utc_timestamp_ms": 1}`+"\n")
		v.write(t, "firecracker.cfg", fmt.Sprintf(
			`{"network-interfaces": [{"iface_id": "eth0", "host_dev_name": %q}, {"iface_id": "eth1", "host_dev_name": %q}]}`, v.eth0, v.eth1))
	}
	return v
}

func (v *laid) write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(v.dir, file), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (v *laid) snapshot(t *testing.T, snapshotter, usage, parent string) string {
	t.Helper()
	ctx := leases.WithLease(v.f.ctx, v.lease)
	mounts, err := v.f.client.SnapshotService(snapshotter).Prepare(ctx, v.lease+"/"+usage, parent,
		snapshots.WithLabels(map[string]string{"flintlock/owner": "test/" + v.name + "/" + v.uid, "flintlock/owner-usage": usage}))
	if err != nil {
		t.Fatal(err)
	}
	return mounts[0].Source
}

func (v *laid) newRecord() map[string]any {
	var r map[string]any
	text := fmt.Sprintf(`{
	 "id": "test/%[1]s/%[2]s", "version": 1,
	 "spec": {
	  "provider": %[3]q, "kernel": {"image": "test.local/kernel:latest", "Filename": "boot/vmlinux", "cmdline": {"quiet": ""}, "add_network_config": true},
	  "vcpu": 2, "memory_inmb": 1024,
	  "network_interfaces": [
	   {"guest_device_name": "eth0", "allow_mmds": true, "guest_mac": "AA:FF:00:00:00:01", "type": "tap", "staticAddrss": {"address": "169.254.0.1/16"}},
	   {"guest_device_name": "eth1", "guest_mac": "02:00:00:00:00:07", "type": "tap"}],
	  "root_volume": {"id": "root", "is_read_only": false, "source": {"container": {"image": "test.local/root:latest"}}},
	  "metadata": {"user-data": %[4]q}, "created_at": 1784455200, "updated_at": 0, "deleted_at": 0},
	 "status": {"state": "created",
	  "volumes": {"root": {"mount": {"type": "dev", "source": %[5]q}}}, "kernel_mount": {"type": "hostpath", "source": %[6]q},
	  "network_interfaces": {"eth0": {"host_device_name": %[7]q, "index": 7, "mac_address": "AA:BB:CC:DD:EE:FF"}, "eth1": {"host_device_name": %[8]q, "index": 8, "mac_address": "AA:BB:CC:DD:EE:F0"}},
	  "retry": 0, "not_before": 0}
	}`, v.name, v.uid, v.provider, base64.StdEncoding.EncodeToString([]byte("secret")), v.root, v.kernel, v.eth0, v.eth1)
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		panic(err)
	}
	return r
}

// status is the record's part of that name.
func (v *laid) status() map[string]any { return v.record["status"].(map[string]any) }

// save writes the next version of the record.
func (v *laid) save(t *testing.T) {
	t.Helper()
	v.version++
	v.record["version"] = v.version
	text, err := json.Marshal(v.record)
	if err != nil {
		t.Fatal(err)
	}
	v.blob(t, fmt.Sprint(v.version), string(text))
}

// blob writes a record, of whatever text, as flintlock does.
func (v *laid) blob(t *testing.T, version, text string) {
	t.Helper()
	const label = "dev.liquidmetal.flintlockd/"
	err := content.WriteBlob(leases.WithLease(v.f.ctx, v.lease), v.f.client.ContentStore(), label+"microvm/test/"+v.name+"/"+v.uid, strings.NewReader(text),
		ocispec.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))},
		content.WithLabels(map[string]string{label + "name": v.name, label + "ns": "test", label + "type": "microvm", label + "version": version, label + "uid": v.uid}))
	if err != nil {
		t.Fatal(err)
	}
}

// blobs are the records of the microVM that containerd has.
func (v *laid) blobs(t *testing.T) (versions []string) {
	t.Helper()
	err := v.f.m.images.Recorded(t.Context(), map[string]string{"dev.liquidmetal.flintlockd/uid": v.uid}, func(labels map[string]string, _ []byte) error {
		versions = append(versions, labels["dev.liquidmetal.flintlockd/version"])
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return versions
}

// start starts the hypervisor. Its guest may be given words.
func (v *laid) start(t *testing.T, words ...string) {
	t.Helper()
	file := func(name string) string { return filepath.Join(v.dir, name) }
	argv := []string{
		"firecracker", "--id", v.uid, "--boot-timer", "--no-api", "--config-file", file("firecracker.cfg"), "--metadata", file("metadata.json"),
	}
	if v.provider == "cloudhypervisor" {
		argv = []string{
			"cloud-hypervisor-static", "--api-socket", file("cloudhypervisor.sock"), "--log-file", file("cloudhypervisor.log"), "-v",
			"--cmdline", "console=hvc0 root=/dev/vda rw reboot=k panic=1 " + strings.Join(words, " "), "--kernel", v.kernel + "/boot/vmlinux", "--cpus", "boot=2",
			"--disk", "path=" + v.root, "--memory", "size=1024M", "--net", "tap=" + v.eth1 + ",mac=02:00:00:00:00:07",
		}
	}
	v.process, v.ended = v.spawn(t, v.provider, argv)
	await(t, "the stand-in", func() bool {
		if v.provider == "cloudhypervisor" {
			c, err := net.Dial("unix", file("cloudhypervisor.sock"))
			if err == nil {
				c.Close()
			}
			return err == nil
		}
		return carrier(v.eth1)
	})
}

// spawn starts a program as flintlock does: a session of its own, with its logs open
// to append, and its number in a file, without a line's end.
func (v *laid) spawn(t *testing.T, name string, argv []string) (*exec.Cmd, chan struct{}) {
	t.Helper()
	path, err := exec.LookPath(argv[0])
	if err != nil {
		t.Fatal(err)
	}
	c := &exec.Cmd{Path: path, Args: argv, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	for file, to := range map[string]func(*os.File){"stdout": func(f *os.File) { c.Stdout = f }, "stderr": func(f *os.File) { c.Stderr = f }} {
		f, err := os.OpenFile(filepath.Join(v.dir, name+"."+file), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		to(f)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { c.Wait(); close(ended) }() // as flintlock does
	t.Cleanup(func() { c.Process.Kill(); <-ended })
	v.write(t, name+".pid", fmt.Sprint(c.Process.Pid))
	return c, ended
}

// carrier says whether somebody has a tap open.
func carrier(device string) bool {
	i, err := net.InterfaceByName(device)
	return err == nil && i.Flags&net.FlagRunning != 0
}

// runs says whether a process runs, and is no zombie.
func runs(c *exec.Cmd) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Process.Pid))
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

// release gives up the lease, and returns when what only that held is gone.
func (v *laid) release(t *testing.T) {
	t.Helper()
	if err := v.f.m.images.Release(t.Context(), v.lease); err != nil {
		t.Fatal(err)
	}
}
