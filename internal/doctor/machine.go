package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"ingot/internal/kvm"
	"ingot/internal/pool"
)

// capabilities are those that root must not have been robbed of.
var capabilities = []struct {
	name string
	bit  uint
}{{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_NET_RAW", unix.CAP_NET_RAW}, {"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}}

func lookRoot(context.Context, Patient) Finding {
	const breaks = "`ingot up` makes namespaces, interfaces and mounts"
	if uid := os.Geteuid(); uid != 0 {
		return fail(fmt.Sprintf("this is uid %d: ingot needs root", uid), breaks, "sudo ingot …")
	}
	var lacking []string
	has := effective()
	for _, c := range capabilities {
		if has>>c.bit&1 == 0 {
			lacking = append(lacking, c.name)
		}
	}
	if len(lacking) > 0 {
		return fail("root is without "+strings.Join(lacking, ", "), breaks, "run this container with --privileged")
	}
	return pass("uid 0")
}

// effective are the capabilities of this process.
func effective() uint64 {
	var mask uint64
	for line := range strings.Lines(read("/proc/self/status")) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			fmt.Sscanf(strings.TrimSpace(hex), "%x", &mask)
		}
	}
	return mask
}

const tun = "/dev/net/tun"

func lookTun(context.Context, Patient) Finding {
	const breaks = "every microVM's network card is a tap device"
	f, err := os.OpenFile(tun, os.O_RDWR, 0)
	switch {
	case err == nil:
		f.Close()
		return pass(tun)
	case os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission):
		return skip("only root may open " + tun)
	case errors.Is(err, fs.ErrNotExist):
		return fail(tun+" is missing", breaks, "modprobe tun; mknod "+tun+" c 10 200").mendedBy(makeTun)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fail("the kernel's module tun is not loaded", breaks, "modprobe tun").
			mendedBy(func(ctx context.Context) error { return modprobe(ctx, "tun") })
	}
	return fail(err.Error(), breaks, "give this container the device: --device "+tun)
}

// makeTun loads the module, which may make the device, or else makes that.
func makeTun(ctx context.Context) error {
	loaded := modprobe(ctx, "tun")
	if _, err := os.Stat(tun); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(tun), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return errors.Join(fmt.Errorf("make %s: %w", tun, err), loaded)
	}
	f, err := os.OpenFile(tun, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, loaded)
	}
	return f.Close()
}

var namespaceLimits = []string{"max_net_namespaces", "max_mnt_namespaces", "max_uts_namespaces"}

func lookNamespaces(context.Context, Patient) Finding {
	const breaks = "a lab's machines are namespaces"
	if os.Geteuid() != 0 {
		return skip("only root can try")
	}
	if !hasFilesystem("overlay") {
		return fail("the kernel has no overlay file system", "a lab's machines see this machine's files below their own", "use a kernel with CONFIG_OVERLAY_FS")
	}
	// The thread ends with this goroutine, and the namespaces with it.
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS)
	if errors.Is(err, unix.ENOSPC) {
		return fail("this machine's limit of namespaces is reached", breaks, "sysctl user.max_net_namespaces=1024, and user.max_mnt_namespaces and user.max_uts_namespaces").
			mendedBy(func(context.Context) error {
				for _, name := range namespaceLimits {
					if err := raise("/proc/sys/user/"+name, 1024); err != nil {
						return err
					}
				}
				return nil
			})
	}
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("tmpfs", "/proc", "tmpfs", 0, "") // any directory will do
	}
	if err != nil {
		return fail("namespaces cannot be made: "+err.Error(), breaks, "run this container with --privileged")
	}
	return pass("network, mount and UTS")
}

// needed are the programs that microVMs and their disks need, and their packages.
var needed = []struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"}, {"mkfs.xfs", "xfsprogs"}, {"resize2fs", "e2fsprogs"},
}

// Packages are the Debian packages that `ingot up` cannot do without.
func Packages() []string {
	var names []string
	for _, n := range needed {
		names = append(names, n.pkg)
	}
	return names
}

func lookPackages(context.Context, Patient) Finding {
	var programs, packages []string
	for _, n := range needed {
		if _, err := pool.Tool(n.program, n.pkg); err != nil {
			programs, packages = append(programs, n.program), append(packages, n.pkg)
		}
	}
	if len(programs) == 0 {
		return pass("all programs are there")
	}
	f := fail(missing(programs), "microVMs and their disks are made with them", "apt-get install "+strings.Join(packages, " "))
	if _, err := exec.LookPath("apt-get"); err != nil {
		f.Fix = "install what Debian calls " + strings.Join(packages, ", ")
		return f
	}
	return f.mendedBy(func(ctx context.Context) error {
		if err := do(ctx, "apt-get", "update"); err != nil {
			return err
		}
		return do(ctx, "apt-get", append([]string{"install", "-y", "--no-install-recommends"}, packages...)...)
	})
}

func missing(names []string) string {
	if len(names) == 1 {
		return names[0] + " is missing"
	}
	return strings.Join(names, ", ") + " are missing"
}

func lookKVM(context.Context, Patient) Finding {
	v := kvm.Probe()
	if v.Usable {
		return pass(fmt.Sprintf("a guest ran, in %.1f ms", float64(v.Elapsed.Microseconds())/1000))
	}
	f := warn(v.Reason(), "QEMU translates what guests run, which is many times slower", "")
	module := kvmModule()
	switch {
	case errors.Is(v.Err, fs.ErrPermission):
		f.Fix = "sudo ingot …"
	case module == "":
		f.Fix = "switch virtualisation on: in the firmware, or nested for this virtual machine"
	case errors.Is(v.Err, fs.ErrNotExist):
		f.Fix = "modprobe " + module
		f = f.mendedBy(func(ctx context.Context) error { return modprobe(ctx, module) })
	default:
		f.Fix = "none on this machine, if it is virtual itself: switch nested virtualisation on where it runs"
	}
	return f
}

// kvmModule is the module for this machine's CPU; empty if that can't do it.
func kvmModule() string {
	for line := range strings.Lines(read("/proc/cpuinfo")) {
		if !strings.HasPrefix(line, "flags") {
			continue
		}
		for _, flag := range strings.Fields(line) {
			switch flag {
			case "vmx":
				return "kvm_intel"
			case "svm":
				return "kvm_amd"
			}
		}
		return ""
	}
	return ""
}

const (
	// A hub, two hosts with their containerd and two microVMs of 256 MiB take
	// somewhat less than the first; the microVMs alone, with QEMU, than the second.
	enoughMemory = 1280 << 20
	leastMemory  = 640 << 20
)

func lookMemory(_ context.Context, p Patient) Finding {
	free, err := freeMemory()
	if err != nil {
		return unseen(err)
	}
	detail := fmt.Sprintf("%d MiB are available", free>>20)
	if free >= enoughMemory || p.running() && free >= leastMemory {
		return pass(detail)
	}
	f := warn("only "+detail, "microVMs are refused, or killed when memory runs out",
		fmt.Sprintf("end what uses it (ps --sort -rss), or give this machine more: %d MiB", enoughMemory>>20))
	if free < leastMemory && !p.running() {
		f.Status = Fail
	}
	return f
}

// freeMemory is what this process may still have: the machine's, or less if a
// control group bounds it.
func freeMemory() (int64, error) {
	free := field(read("/proc/meminfo"), "MemAvailable:") << 10
	if free <= 0 {
		return 0, errors.New("/proc/meminfo does not have MemAvailable")
	}
	_, group, ok := strings.Cut(read("/proc/self/cgroup"), "0::")
	if !ok {
		return free, nil
	}
	group, _, _ = strings.Cut(group, "\n")
	for dir := filepath.Join("/sys/fs/cgroup", group); strings.HasPrefix(dir, "/sys/fs/cgroup"); dir = filepath.Dir(dir) {
		var limit, used int64
		if n, _ := fmt.Sscan(read(filepath.Join(dir, "memory.max")), &limit); n != 1 {
			continue // max, or there is none
		}
		fmt.Sscan(read(filepath.Join(dir, "memory.current")), &used)
		cache := field(read(filepath.Join(dir, "memory.stat")), "file")
		free = min(free, limit-used+cache)
	}
	return free, nil
}

// field is a number that follows a word at the beginning of a line.
func field(text, word string) int64 {
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == word {
			var n int64
			fmt.Sscan(fields[1], &n)
			return n
		}
	}
	return 0
}
