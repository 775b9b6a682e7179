// Package need says what a test cannot do without. Where the machine lacks it,
// the test is skipped with the reason; with INGOT_NEED=all, which continuous
// integration sets, it fails instead, so that no test is lost without notice. It
// provides nothing: a test makes what it needs, and takes it away again.
package need

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// exempt names what continuous integration may lack, and why: these needs skip
// even with INGOT_NEED=all.
var exempt = map[string]string{
	"cgroup2":      "machines with the older control groups are still about",
	"br_netfilter": "a module that machines have where somebody (Docker) has loaded it",
	"kea-dhcp4":    "its packages come with a service, and are too many to unpack",
	"/dev/kvm":     "virtual machines in which tests run often have none",
}

// Root asks for uid 0.
func Root(t testing.TB) {
	t.Helper()
	lack(t, "root", root())
}

// NetNS asks for the right to make network and mount namespaces, and for tap
// devices in them.
func NetNS(t testing.TB) {
	t.Helper()
	lack(t, "netns", netns())
}

// Loop asks for a free loop device.
func Loop(t testing.TB) {
	t.Helper()
	lack(t, "loop", loop())
}

// QEMU asks for a QEMU that runs guests of this machine's architecture.
func QEMU(t testing.TB) {
	t.Helper()
	Binary(t, map[string]string{"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}[runtime.GOARCH])
}

// CGroup2 asks for control groups of the second version.
func CGroup2(t testing.TB) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err == nil && !strings.Contains(string(b), "0::/") {
		err = errors.New("this machine has the first version")
	}
	lack(t, "cgroup2", err)
}

// BridgeFilter asks for the kernel's module that shows bridged frames to the rules
// for routed packets.
func BridgeFilter(t testing.TB) {
	t.Helper()
	_, err := os.Stat("/proc/sys/net/bridge")
	lack(t, "br_netfilter", err)
}

// KVMDevice asks for a /dev/kvm that can be opened; whether it runs guests is for package
// kvm to say.
func KVMDevice(t testing.TB) {
	t.Helper()
	lack(t, "/dev/kvm", openable("/dev/kvm"))
}

// IOAccounting asks for the kernel's count of what processes read and write
// (CONFIG_TASK_IO_ACCOUNTING).
func IOAccounting(t testing.TB) {
	t.Helper()
	_, err := os.Stat("/proc/self/io")
	lack(t, "/proc/self/io", err)
}

// Time asks for minutes, which `go test -short` does not have.
func Time(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("this test needs minutes: not with -short")
	}
}

// Binary asks for a program in PATH, or in a place that only root's PATH names.
func Binary(t testing.TB, name string) {
	t.Helper()
	lack(t, name, binary(name))
}

// lack skips or fails a test, if err says that something is missing.
func lack(t testing.TB, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	message := fmt.Sprintf("this test needs %s: %v", what, err)
	if os.Getenv("INGOT_NEED") == "all" && exempt[what] == "" {
		t.Fatal(message)
	}
	t.Skip(message)
}

func root() error {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("the uid is %d", uid)
	}
	return nil
}

// netns tries it on a thread that ends with its goroutine, since it is never
// unlocked: a namespace of its own must not come back to the scheduler.
func netns() error {
	if err := root(); err != nil {
		return err
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	}()
	if err := <-result; err != nil {
		return fmt.Errorf("make a namespace: %w", err)
	}
	return openable("/dev/net/tun")
}

func loop() error {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
		return fmt.Errorf("find a free loop device: %w", err)
	}
	return nil
}

func openable(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func binary(name string) error {
	if _, err := exec.LookPath(name); err == nil {
		return nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
		if unix.Access(dir+name, unix.X_OK) == nil {
			return nil
		}
	}
	return fmt.Errorf("there is no %s in PATH", name)
}
