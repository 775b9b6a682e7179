package boot

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"ingot/internal/need"
	"ingot/internal/vm"
)

func spec() vm.Spec {
	return vm.Spec{
		UID: "01JB", Namespace: "default", Name: "web",
		Kernel: vm.Kernel{AddNetworkConfig: true, Cmdline: map[string]string{"quiet": "", "z": "1", "a": "2", "panic": "5"}},
		Root:   vm.Volume{ID: "root"},
		Volumes: []vm.Volume{
			{ID: "shared", VirtioFS: "/srv", MountPoint: "/srv"},
			{ID: "modules", MountPoint: "/lib/modules/6.1", ReadOnly: true},
			{ID: "data", MountPoint: "/data"},
		},
		Interfaces: []vm.Interface{
			{ID: "eth0", MAC: "aa:ff:00:00:00:01", Address: netip.MustParsePrefix("169.254.0.1/16"), Metadata: true},
			{ID: "eth1", MAC: "AA:35:EB:D4:61:B1"},
			{ID: "eth2", Address: netip.MustParsePrefix("10.0.0.5/24"), Gateway: netip.MustParseAddr("10.0.0.1"), Nameservers: []netip.Addr{netip.MustParseAddr("1.1.1.1")}},
		},
	}
}

func TestNetworkConfig(t *testing.T) {
	got, err := NetworkConfig(spec())
	if err != nil {
		t.Fatal(err)
	}
	want := `version: 2
ethernets:
  eth0:
    match:
      macaddress: AA:FF:00:00:00:01
    addresses:
    - 169.254.0.1/16
    dhcp4: false
    dhcp6: false
    dhcp-identifier: mac
  eth1:
    match:
      macaddress: AA:35:EB:D4:61:B1
    dhcp4: true
    dhcp6: true
    dhcp-identifier: mac
  eth2:
    match:
      name: eth2
    addresses:
    - 10.0.0.5/24
    gateway4: 10.0.0.1
    dhcp4: false
    dhcp6: false
    dhcp-identifier: mac
    nameservers:
      addresses:
      - 1.1.1.1
`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestCmdline(t *testing.T) {
	s := spec()
	s.Process = vm.Process{Args: []string{"sh", "-c", "true"}, Env: map[string]string{"A": "b"}}
	got, archive, err := Cmdline(s, "last=1")
	if err != nil {
		t.Fatal(err)
	}
	config, err := NetworkConfig(s)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"root=/dev/vda", "rw", "panic=5", "quiet", "net.ifnames=0", "systemd.machine_id=28a6bbdf11cfd77b825eae8510bb9fdc",
		"ds=nocloud-net;s=http://169.254.169.254/latest/", "ingot.hostname=web",
		"ingot.mount=/dev/vdb:/lib/modules/6.1:ro", "ingot.mount=/dev/vdc:/data",
		"a=2", "z=1",
		"network-config=" + base64.StdEncoding.EncodeToString([]byte(config)),
		"ingot.process=" + base64.RawURLEncoding.EncodeToString([]byte(`{"args":["sh","-c","true"],"env":{"A":"b"}}`)),
		"last=1",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if archive != nil {
		t.Errorf("an archive of %d bytes for a short process", len(archive))
	}
	for range 10 {
		if again, _, _ := Cmdline(s, "last=1"); !slices.Equal(again, got) {
			t.Fatal("another order")
		}
	}
	s.Process.Env["LONG"] = strings.Repeat("x", 2000)
	if _, _, err := Cmdline(s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("2000 bytes of environment, and no initramfs: %v", err)
	}
	s = spec()
	s.Kernel.Cmdline["evil"] = "x\nroot=/dev/vdb"
	if _, _, err := Cmdline(s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a line break: %v", err)
	}
}

func TestRootDevice(t *testing.T) {
	for partition, want := range map[string]string{"": "/dev/vda", "2": "/dev/vda2", "ab12-01": "PARTUUID=ab12-01"} {
		if got := rootDevice(vm.Volume{Partition: partition}); got != want {
			t.Errorf("partition %q: %s, want %s", partition, got, want)
		}
	}
	for n, want := range map[int]string{0: "vda", 25: "vdz", 26: "vdaa", 51: "vdaz", 52: "vdba"} {
		if got := diskName(n); got != want {
			t.Errorf("disk %d: %s, want %s", n, got, want)
		}
	}
}

// What is too long for the command line goes into an archive, which makes an
// initramfs with the one before it.
func TestLongProcess(t *testing.T) {
	need.Binary(t, "cpio")
	s := spec()
	s.Initrd = &vm.File{Image: "kernel", Path: "boot/initrd"}
	s.Process = vm.Process{Args: []string{"env"}, Env: map[string]string{"LONG": strings.Repeat("x", 5000)}, StopSignal: "SIGINT"}
	words, archive, err := Cmdline(s, "last=1")
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, WordProcess) }); i >= 0 || words[len(words)-1] != "last=1" {
		t.Errorf("words %q", words)
	}
	var first, both bytes.Buffer
	if err := Initramfs(&first, []byte("init!"), nil); err != nil {
		t.Fatal(err)
	}
	if err := AppendInitramfs(&both, &first, archive); err != nil {
		t.Fatal(err)
	}
	if both.Len()%4 != 0 || both.Len() <= len(archive) {
		t.Fatalf("%d bytes", both.Len())
	}
	dir := t.TempDir()
	cpio := exec.Command("cpio", "-i", "--no-absolute-filenames")
	cpio.Dir, cpio.Stdin = dir, bytes.NewReader(both.Bytes()[both.Len()-len(archive):])
	if out, err := cpio.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(dir, ProcessFile))
	if err != nil {
		t.Fatal(err)
	}
	var got vm.Process
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s.Process, got); d != "" {
		t.Error(d)
	}
}

func TestProcess(t *testing.T) {
	env := map[string]string{"A": "1", "B": "2"}
	image := vm.Process{Entrypoint: []string{"nginx"}, Args: []string{"-g", "daemon off;"}, Env: env, Dir: "/srv", User: "www", StopSignal: "SIGQUIT"}
	with := func(args ...string) vm.Process {
		return vm.Process{Args: args, Env: env, Dir: "/srv", User: "www", StopSignal: "SIGQUIT"}
	}
	attached := with("nginx", "-v")
	attached.Attach = true
	for name, tc := range map[string]struct{ spec, image, want vm.Process }{
		"the image's": {image: image, want: with("nginx", "-g", "daemon off;")},
		"arguments":   {spec: vm.Process{Args: []string{"-v"}}, image: image, want: with("nginx", "-v")},
		"entrypoint":  {spec: vm.Process{Entrypoint: []string{"sh"}}, image: image, want: with("sh")},
		"both":        {spec: vm.Process{Entrypoint: []string{"sh"}, Args: []string{"-c", "id"}}, image: image, want: with("sh", "-c", "id")},
		"none":        {spec: vm.Process{Entrypoint: []string{""}, Args: []string{"id"}}, image: image, want: with("id")},
		"the rest": {
			spec:  vm.Process{Env: map[string]string{"B": "3"}, Dir: "/", User: "0", StopSignal: "9"},
			image: image,
			want:  vm.Process{Args: []string{"nginx", "-g", "daemon off;"}, Env: map[string]string{"A": "1", "B": "3"}, Dir: "/", User: "0", StopSignal: "9"},
		},
		"a shell":           {image: vm.Process{Args: []string{"/bin/sh"}}, want: vm.Process{Env: map[string]string{}}},
		"an attached shell": {spec: vm.Process{Attach: true}, image: vm.Process{Args: []string{"bash"}}, want: vm.Process{Args: []string{"bash"}, Env: map[string]string{}, Attach: true}},
		"attached":          {spec: vm.Process{Args: []string{"-v"}, Attach: true}, image: image, want: attached},
		"nothing at all":    {spec: vm.Process{Attach: true}, want: vm.Process{Args: []string{"sh"}, Env: map[string]string{}, Attach: true}},
		"own shell":         {spec: vm.Process{Entrypoint: []string{"sh"}}, want: vm.Process{Args: []string{"sh"}, Env: map[string]string{}}},
	} {
		if d := cmp.Diff(tc.want, Process(tc.spec, tc.image)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestMetadata(t *testing.T) {
	s := spec()
	s.Metadata = map[string]string{"meta-data": "instance_id: default/web\nlocal_hostname: other", "x": "y"}
	got := Metadata(s)
	want := map[string]string{
		"meta-data":   "instance_id: default/web\nlocal_hostname: other\ninstance-id: \"default/web\"\nlocal-hostname: \"other\"\n",
		"user-data":   "",
		"vendor-data": "## template: jinja\n#cloud-config\n\nmounts:\n- - vdb\n  - /lib/modules/6.1\n- - vdc\n  - /data\nmount_default_fields:\n- None\n- None\n- auto\n- defaults,nofail\n- \"0\"\n- \"2\"\n",
		"x":           "y",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	s.Metadata["vendor-data"] = "#cloud-config\nhostname: h\nmounts:\n- [vdx, /x]\n"
	v := Metadata(s)["vendor-data"]
	if !strings.Contains(v, "hostname: h") || !strings.Contains(v, "/x") || !strings.Contains(v, "/data") {
		t.Errorf("vendor-data %q", v)
	}
	s.Metadata["vendor-data"] = "#!/bin/sh\n"
	if v := Metadata(s)["vendor-data"]; v != "#!/bin/sh\n" {
		t.Errorf("a script became %q", v)
	}
	if s.Metadata["user-data"] != "" || len(s.Metadata) != 3 {
		t.Error("the spec's own metadata was changed")
	}
}

// Whatever form meta-data has, it is YAML that says who the guest is.
func TestMetaData(t *testing.T) {
	for text, more := range map[string]map[string]any{
		"":                           {},
		"# none\n":                   {},
		"a: b":                       {"a": "b"},
		"---\na: [1, \"2\"]\n...":    {"a": []any{uint64(1), "2"}},
		`{"a": {"b": "on"}, "n": 1}`: {"a": map[string]any{"b": "on"}, "n": uint64(1)},
		"{\n  a: 'yes'\n}\n":         {"a": "yes"},
	} {
		for _, name := range []string{"web", "on", "123", "0x10", "null", "1_0", "a.b"} {
			s := vm.Spec{UID: "01JB", Name: name, Metadata: map[string]string{"meta-data": text}}
			want := map[string]any{"instance_id": "01JB", "instance-id": "01JB", "local-hostname": name}
			maps.Copy(want, more)
			got := Metadata(s)["meta-data"]
			var have map[string]any
			if err := yaml.Unmarshal([]byte(got), &have); err != nil {
				t.Fatalf("%q: %v", got, err)
			}
			if d := cmp.Diff(want, have); d != "" {
				t.Errorf("%q: %s", got, d)
			}
			if !strings.Contains(got, `"`+name+`"`) { // cloud-init's YAML takes more for numbers than ours
				t.Errorf("%q: the name is not quoted", got)
			}
		}
	}
	own := "instance-id: i\ninstance_id: j\nlocal-hostname: h\n"
	if got := Metadata(vm.Spec{UID: "01JB", Name: "web", Metadata: map[string]string{"meta-data": own}})["meta-data"]; got != own {
		t.Errorf("complete meta-data became %q", got)
	}
}

// A client's YAML is not made larger than it is written, however it is meant: a daemon that
// follows its aliases is out of memory, and so is the next one, with the same record.
func TestMetadataOfAliases(t *testing.T) {
	s := spec()
	aliases := "{a0: &a0 [x]"
	for i := 1; i < 8; i++ {
		aliases += fmt.Sprintf(", a%d: &a%d [%s]", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d , ", i-1), 9), ", "))
	}
	aliases += "}\n"
	s.Metadata = map[string]string{"meta-data": aliases, "vendor-data": "#cloud-config\n" + aliases}
	for key, text := range Metadata(s) {
		if len(text) > 2000 {
			t.Errorf("%s has %d bytes", key, len(text))
		}
	}
	if v := Metadata(s); !strings.Contains(v["vendor-data"], "/data") || !strings.Contains(v["meta-data"], "instance-id") {
		t.Errorf("%q", v)
	}
	for name, text := range map[string]string{
		"brackets": strings.Repeat("[", 1<<20), "dashes": strings.Repeat("- ", 1<<19), "keys": "#cloud-config\n" + strings.Repeat("k: v\n", 1<<18),
		"itself": "#cloud-config\na: &a [*a]\n",
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		s.Metadata = map[string]string{"meta-data": text, "vendor-data": text}
		start := time.Now()
		Metadata(s)
		runtime.ReadMemStats(&after)
		if took, had := time.Since(start), (after.TotalAlloc-before.TotalAlloc)>>20; took > 10*time.Second || had > 2000 {
			t.Errorf("%s: %v, %d MiB", name, took, had)
		}
	}
}

// Clones of an image with a machine-id of its own are told apart.
func TestMachineID(t *testing.T) {
	id := func(uid string, own map[string]string) string {
		words, _, err := Cmdline(vm.Spec{UID: uid, Name: "web", Kernel: vm.Kernel{Cmdline: own}})
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range words {
			if id, ok := strings.CutPrefix(w, "systemd.machine_id="); ok {
				return id
			}
		}
		return ""
	}
	one, other := id("01JB", nil), id("01JC", nil)
	if one == other || !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(one) || id("01JB", nil) != one {
		t.Errorf("machine ids %s, %s", one, other)
	}
	if got := id("01JB", map[string]string{"systemd.machine_id": "own"}); got != "own" {
		t.Errorf("the spec's own became %s", got)
	}
}

// vmlinux is what compresses: some of it well, some not.
func vmlinux() []byte {
	b := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel "), 40000)...)
	for i := range 5000 {
		b = append(b, byte(i*i>>3), byte(i*7))
	}
	return b
}

func bzImage(payload []byte, size int) []byte {
	le := binary.LittleEndian
	b := make([]byte, 5*512+100)
	b[offSetupSects] = 4
	copy(b[offMagic:], "HdrS")
	le.PutUint16(b[offVersion:], 0x20f)
	le.PutUint32(b[offPayload:], 100)
	le.PutUint32(b[offPayloadLength:], uint32(len(payload)+4))
	b = le.AppendUint32(append(b, payload...), uint32(size))
	return append(b, "the rest of the image"...)
}

func compressors(t testing.TB) map[string]func([]byte) []byte {
	to := func(open func(io.Writer) io.WriteCloser) func([]byte) []byte {
		return func(b []byte) []byte {
			var out bytes.Buffer
			w := open(&out)
			w.Write(b)
			w.Close()
			return out.Bytes()
		}
	}
	return map[string]func([]byte) []byte{
		"gzip": to(func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }),
		"zstd": to(func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		}),
		"lz4": to(func(w io.Writer) io.WriteCloser {
			z := lz4.NewWriter(w)
			if err := z.Apply(lz4.LegacyOption(true)); err != nil {
				t.Fatal(err)
			}
			return z
		}),
	}
}

func TestExtractVmlinux(t *testing.T) {
	want := vmlinux()
	all := compressors(t)
	all["xz"] = func(b []byte) []byte { return xzAsTheKernelDoes(t, b) }
	for name, compress := range all {
		t.Run(name, func(t *testing.T) {
			got, err := ExtractVmlinux(bzImage(compress(want), len(want)))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("another kernel")
			}
			if _, err := ExtractVmlinux(bzImage(compress(want), len(want)+1)); err == nil {
				t.Error("a wrong size was taken")
			}
			whole := bzImage(compress(want), len(want))
			if _, err := ExtractVmlinux(whole[:len(whole)-100]); err == nil {
				t.Error("a cut image was taken")
			}
			if _, err := ExtractVmlinux(bzImage(compress([]byte("no kernel")), 9)); err == nil {
				t.Error("no ELF was taken")
			}
		})
	}
	if got, err := ExtractVmlinux(want); err != nil || !bytes.Equal(got, want) {
		t.Errorf("an ELF file: %v", err)
	}
	for _, bad := range [][]byte{nil, []byte("x"), make([]byte, 5000), bzImage(nil, 0), bzImage([]byte("junk junk"), 9)} {
		if _, err := ExtractVmlinux(bad); err == nil {
			t.Errorf("%d bytes were taken", len(bad))
		}
	}
}

// xzAsTheKernelDoes uses the filter for x86 code, which not every reader knows.
func xzAsTheKernelDoes(t *testing.T, b []byte) []byte {
	t.Helper()
	need.Binary(t, "xz")
	cmd := exec.Command("xz", "--check=crc32", "--x86", "--lzma2=,dict=32MiB", "-c")
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func FuzzExtractVmlinux(f *testing.F) {
	small := append([]byte("\x7fELF"), "a small kernel"...)
	for _, compress := range compressors(f) {
		f.Add(bzImage(compress(small), len(small)))
	}
	f.Add(bzImage([]byte("junk"), 4))
	f.Fuzz(func(t *testing.T, image []byte) {
		got, err := ExtractVmlinux(image)
		if err == nil && !isELF(got) {
			t.Error("no ELF file, and no error")
		}
	})
}

func TestInitramfs(t *testing.T) {
	need.Binary(t, "busybox")
	modules := []Module{{"virtio", []byte("12345")}, {"virtio_net", []byte("x")}}
	var first, second bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		if err := Initramfs(b, []byte("#!init"), modules); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same parts made two archives")
	}
	dir := t.TempDir()
	cpio := exec.Command("busybox", "cpio", "-i", "-d")
	cpio.Dir, cpio.Stdin = dir, &first
	if out, err := cpio.CombinedOutput(); err != nil {
		if _, statErr := os.Stat(filepath.Join(dir, "init")); statErr != nil {
			t.Fatalf("cpio: %v: %s", err, out) // as a user it cannot make the console, and goes on
		}
	}
	for name, want := range map[string]string{
		"init": "#!init", "modules/virtio.ko": "12345", "modules/virtio_net.ko": "x",
		"modules/list": "/modules/virtio.ko\n/modules/virtio_net.ko\n",
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
