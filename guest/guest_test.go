package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"ingot/internal/agent"
	"ingot/internal/boot"
	"ingot/internal/image/build"
	"ingot/internal/need"
)

// parts are what all guests boot with: made once.
type parts struct{ init, kernel, initrd, root string }

var makeParts = sync.OnceValues(func() (p parts, err error) {
	dir, err := os.MkdirTemp("", "ingot-guest-test-*")
	if err != nil {
		return p, err
	}
	partsDir = dir
	p = parts{dir + "/init", dir + "/vmlinux", dir + "/initrd", dir + "/root.img"}
	if err := readSources("init/*.go", "../internal/agent/*.go"); err != nil {
		return p, err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", p.init, "ingot/guest/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("%w: %s", err, out)
	}
	init, err := os.ReadFile(p.init)
	if err != nil {
		return p, err
	}
	ctx := context.Background()
	kernel, err := build.Kernel(ctx, build.Options{}, init)
	if err != nil {
		return p, err
	}
	if err := unpack(kernel, map[string]string{build.KernelPath: p.kernel, build.InitrdPath: p.initrd}); err != nil {
		return p, err
	}
	busybox, err := build.Busybox(ctx, build.Options{})
	if err != nil {
		return p, err
	}
	return p, makeDisk(busybox, dir+"/root", p.root)
})

var partsDir string

// readSources reads what the guest's program is built from, so that the go
// command knows that these tests' results depend on it.
func readSources(patterns ...string) error {
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			return fmt.Errorf("no sources %s: %w", pattern, err)
		}
		for _, f := range files {
			if _, err := os.ReadFile(f); err != nil {
				return err
			}
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	code := m.Run()
	if partsDir != "" {
		os.RemoveAll(partsDir)
	}
	os.Exit(code)
}

func unpack(img v1.Image, files map[string]string) error {
	r := mutate.Extract(img)
	defer r.Close()
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		to := files[h.Name]
		if to == "" {
			continue
		}
		b, err := io.ReadAll(t)
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, b, 0o644); err != nil {
			return err
		}
	}
}

// makeDisk makes an ext4 file system of an image.
func makeDisk(img v1.Image, dir, file string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	r := mutate.Extract(img)
	defer r.Close()
	untar := exec.Command("tar", "-x", "-C", dir)
	untar.Stdin = r
	if out, err := untar.CombinedOutput(); err != nil {
		return fmt.Errorf("tar: %w: %s", err, out)
	}
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", dir, file, "64M").CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	return nil
}

// guestVM is a QEMU with a guest, and its agent.
type guestVM struct {
	*agent.Client
	dir     string
	started time.Time
	done    chan struct{}
}

// start boots a guest. args are more of QEMU's, words more of the kernel's.
func start(t *testing.T, words []string, args ...string) *guestVM {
	t.Helper()
	return startIn(t, "", "", words, args...)
}

// startIn boots a guest in a network namespace, with another root disk.
func startIn(t *testing.T, netns, root string, words []string, args ...string) *guestVM {
	t.Helper()
	need.QEMU(t)
	need.Binary(t, "mke2fs")
	p, err := makeParts()
	if err != nil {
		t.Fatal(err)
	}
	if root == "" {
		root = p.root
	}
	vm := &guestVM{dir: t.TempDir(), done: make(chan struct{})}
	// The root is written to: a copy each.
	if out, err := exec.Command("cp", "--sparse=always", root, vm.dir+"/root.img").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	words = append([]string{"console=ttyS0", "reboot=t", "panic=-1", "root=/dev/vda", "rw", "quiet"}, words...)
	argv := append([]string{"-M", "q35", "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max", "-m", "128", "-nodefaults", "-no-user-config",
		"-display", "none", "-no-reboot", "-kernel", p.kernel, "-initrd", p.initrd, "-append", strings.Join(words, " "),
		"-chardev", "socket,id=con,path=" + vm.dir + "/con.sock,server=on,wait=off,logfile=" + vm.dir + "/console", "-serial", "chardev:con",
		"-drive", "id=d0,if=none,format=raw,file=" + vm.dir + "/root.img", "-device", "virtio-blk-pci,drive=d0",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ag,path=" + vm.dir + "/agent.sock,server=on,wait=off",
		"-device", "virtserialport,chardev=ag,name=" + agent.Port, "-device", "virtio-rng-pci",
		"-qmp", "unix:" + vm.dir + "/qmp.sock,server=on,wait=off"}, args...)
	cmd := exec.Command("qemu-system-x86_64", argv...)
	if netns != "" {
		cmd = exec.Command("ip", append([]string{"netns", "exec", netns, "qemu-system-x86_64"}, argv...)...)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	vm.started = time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with QEMU, which the clean-up waits for
		cmd.Wait()
		close(vm.done)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-vm.done
		if vm.Client != nil {
			vm.Close()
		}
		if t.Failed() {
			console, _ := os.ReadFile(vm.dir + "/console")
			t.Logf("console:\n%s\nqemu: %s", console, stderr.String())
		}
	})
	vm.connect(t)
	return vm
}

// connect talks to the agent anew, as a restarted host would.
func (vm *guestVM) connect(t *testing.T) {
	t.Helper()
	conn := dial(t, vm.dir+"/agent.sock")
	vm.Client = agent.NewClient(conn)
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (vm *guestVM) context(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// await waits for an event.
func (vm *guestVM) await(t *testing.T, is func(agent.Event) bool) agent.Event {
	t.Helper()
	ctx := vm.context(t)
	for {
		select {
		case e, ok := <-vm.Events():
			if !ok {
				t.Fatal("the agent's connection ended")
			}
			if is(e) {
				return e
			}
		case <-ctx.Done():
			t.Fatal("the event did not come")
		}
	}
}

func kind(k agent.EventKind) func(agent.Event) bool {
	return func(e agent.Event) bool { return e.Kind == k }
}

func (vm *guestVM) ended(t *testing.T) {
	t.Helper()
	select {
	case <-vm.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the guest did not end")
	}
}

func (vm *guestVM) run(t *testing.T, cmd agent.Command, in io.Reader) (int, string, string) {
	t.Helper()
	var out, errOut bytes.Buffer
	x, err := vm.Exec(vm.context(t), cmd, in, &out, &errOut)
	if err != nil {
		t.Fatal(err)
	}
	code, err := x.Wait()
	var refused *agent.Error
	if err != nil && !errors.As(err, &refused) {
		t.Fatal(err)
	}
	return code, out.String(), errOut.String()
}

func sh(script string) agent.Command { return agent.Command{Args: []string{"sh", "-c", script}} }

func TestBoot(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{"ingot.hostname=first"})
	vm.await(t, kind(agent.Ready))
	t.Logf("QEMU's start to ready: %v", time.Since(vm.started))
	info, err := vm.Info(vm.context(t))
	if err != nil {
		t.Fatal(err)
	}
	if info.Hostname != "first" || !info.Ready || !strings.Contains(info.Kernel, "cloud") {
		t.Errorf("info %+v", info)
	}
	size, err := os.Stat(mustParts(t).init)
	if err != nil || size.Size() > 4<<20 {
		t.Errorf("the guest's program has %d bytes, %v; at most 4 MiB", size.Size(), err)
	}
	t.Logf("program: %d bytes", size.Size())

	for name, tc := range map[string]struct {
		cmd      agent.Command
		in       string
		code     int
		out, err string
	}{
		"code":     {cmd: sh("exit 3"), code: 3},
		"outputs":  {cmd: sh("echo out; echo err >&2"), out: "out\n", err: "err\n"},
		"input":    {cmd: sh("cat; cat /etc/hostname"), in: "in\n", out: "in\nfirst\n"},
		"signal":   {cmd: sh("kill -15 $$"), code: 143},
		"missing":  {cmd: agent.Command{Args: []string{"nosuch"}}, code: 127},
		"user":     {cmd: agent.Command{Args: []string{"sh", "-c", "id -un; echo $HOME"}, User: "nobody"}, out: "nobody\n/nonexistent\n"},
		"root":     {cmd: sh("touch /written && mount | grep -c ' / '"), out: "1\n"},
		"init":     {cmd: sh("cat /proc/1/comm"), out: "init\n"},
		"own root": {cmd: sh("ls -A / | grep -v '^written$' | tr '\\n' ' '"), out: "bin dev etc home lost+found mnt proc root run sbin sys tmp usr var "},
		"loopback": {cmd: sh("ping -c 1 -W 2 127.0.0.1 >/dev/null && echo ok"), out: "ok\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var in io.Reader
			if tc.in != "" {
				in = strings.NewReader(tc.in)
			}
			code, out, errOut := vm.run(t, tc.cmd, in)
			if code != tc.code || out != tc.out || errOut != tc.err {
				t.Errorf("code %d, output %q, error output %q", code, out, errOut)
			}
		})
	}
	t.Run("terminal", func(t *testing.T) { terminal(t, vm) })
	t.Run("much output", func(t *testing.T) { muchOutput(t, vm) })
	t.Run("reconnect", func(t *testing.T) { reconnect(t, vm) })
	if err := vm.Shutdown(vm.context(t), false); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	vm.ended(t)
	t.Logf("shutdown took %v", time.Since(begin))
}

func mustParts(t *testing.T) parts {
	t.Helper()
	p, err := makeParts()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func terminal(t *testing.T, vm *guestVM) {
	in, typing := io.Pipe()
	out, seen := io.Pipe()
	x, err := vm.Exec(vm.context(t), agent.Command{Args: []string{"sh"}, TTY: true, Rows: 20, Cols: 70}, in, seen, nil)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want string) {
		t.Helper()
		var text string
		buf := make([]byte, 1024)
		for !strings.Contains(text, want) {
			n, err := out.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q, want %q", err, text, want)
			}
			text += string(buf[:n])
		}
	}
	fmt.Fprint(typing, "stty size\n")
	expect("20 70")
	x.Resize(33, 101)
	fmt.Fprint(typing, "stty size\n")
	expect("33 101")
	fmt.Fprint(typing, "sh -c 'echo up$((1+1)); exec sleep 100'\n")
	expect("up2")
	fmt.Fprint(typing, "\x03echo $((6*7))\n") // ^C reaches the foreground
	expect("42")
	go io.Copy(io.Discard, out) // ends with seen
	fmt.Fprint(typing, "exit 9\n")
	if code, err := x.Wait(); code != 9 || err != nil {
		t.Errorf("code %d, %v", code, err)
	}
	typing.Close()
	seen.Close()
}

func muchOutput(t *testing.T, vm *guestVM) {
	begin := time.Now()
	code, out, _ := vm.run(t, agent.Command{Args: []string{"head", "-c", "4000000", "/dev/zero"}}, nil)
	if code != 0 || len(out) != 4000000 {
		t.Errorf("code %d, %d bytes", code, len(out))
	}
	t.Logf("4 MB out: %v", time.Since(begin))
	begin = time.Now()
	_, out, _ = vm.run(t, agent.Command{Args: []string{"wc", "-c"}}, bytes.NewReader(make([]byte, 4000000)))
	if out != "4000000\n" {
		t.Errorf("wc says %q", out)
	}
	t.Logf("4 MB in: %v", time.Since(begin))
	begin = time.Now()
	for range 20 {
		if _, err := vm.Info(vm.context(t)); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("a question: %v", time.Since(begin)/20)
}

// reconnect goes in the middle of much output, several times.
func reconnect(t *testing.T, vm *guestVM) {
	for range 5 {
		got, out := io.Pipe()
		x, err := vm.Exec(vm.context(t), agent.Command{Args: []string{"cat", "/dev/zero"}}, nil, out, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(got, make([]byte, 100000)); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, got) // ends with out
		vm.Close()
		if _, err := x.Wait(); !errors.Is(err, agent.ErrClosed) {
			t.Errorf("error %v", err)
		}
		out.Close()
		vm.connect(t)
		begin := time.Now()
		if _, err := vm.Info(vm.context(t)); err != nil {
			t.Fatal(err)
		}
		t.Logf("answered %v after the reconnection", time.Since(begin))
	}
	// The commands of the hosts that went are gone, too.
	for range 100 {
		_, out, _ := vm.run(t, sh("pidof cat"), nil)
		if out == "" {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("a command outlived its host")
}

// A guest whose drivers do not come from the initramfs waits for its root too,
// and says what it lacks where that does not come.
func TestNoDrivers(t *testing.T) {
	need.QEMU(t)
	p, err := makeParts()
	if err != nil {
		t.Fatal(err)
	}
	init, err := os.ReadFile(p.init)
	if err != nil {
		t.Fatal(err)
	}
	var initrd bytes.Buffer
	if err := boot.Initramfs(&initrd, init, nil); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(file, initrd.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	vm := start(t, nil, "-initrd", file)
	vm.ended(t)
	console, err := os.ReadFile(vm.dir + "/console")
	if err != nil || !bytes.Contains(console, []byte("no device /dev/vda")) {
		t.Errorf("the console does not say why: %v", err)
	}
}
