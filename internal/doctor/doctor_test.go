package doctor_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
	"ingot/internal/need"
	"ingot/internal/tests"
)

// TestMain runs the tests in namespaces of their own, where named ones are pinned apart; or
// what a lab is made of.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "lab" {
		if err := labMain(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	tests.Apart(m, tests.Fresh("tmpfs", "/run"))
}

// again runs a test once more, in another process.
func again(t *testing.T, how *syscall.SysProcAttr) {
	t.Helper()
	c := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	c.Env = append(os.Environ(), "AGAIN="+t.Name())
	c.SysProcAttr = how
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func needs(t *testing.T) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
}

func sh(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// mount puts a file system there until the test ends.
func mount(t *testing.T, source, dir, kind string, flags uintptr, options string) {
	t.Helper()
	if err := unix.Mount(source, dir, kind, flags, options); err != nil {
		t.Fatalf("mount %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// look makes one check.
func look(t *testing.T, name string, p doctor.Patient) doctor.Finding {
	t.Helper()
	for _, c := range doctor.Checks() {
		if c.Name == name {
			r := doctor.Look(t.Context(), p, []doctor.Check{c})
			if f := r.Checks[0]; f.Wrong() && (f.Detail == "" || f.Breaks == "" || f.Fix == "") {
				t.Errorf("%s does not say all: %+v", name, f)
			}
			return r.Checks[0]
		}
	}
	t.Fatalf("there is no check %s", name)
	return doctor.Finding{}
}

// expect makes one check, which is to end so and to have these words.
func expect(t *testing.T, name string, p doctor.Patient, status doctor.Status, words string) doctor.Finding {
	t.Helper()
	f := look(t, name, p)
	if f.Status != status || !strings.Contains(f.Detail, words) {
		t.Errorf("%s: %s: %s; want %s: %s", name, f.Status, f.Detail, status, words)
	}
	return f
}

// mend does what mends a finding, twice, and looks again.
func mend(t *testing.T, f doctor.Finding, p doctor.Patient) {
	t.Helper()
	if !f.Fixable {
		t.Fatalf("%s: not fixable: %s: %s", f.Name, f.Status, f.Detail)
	}
	for range 2 {
		if err := f.Mend(t.Context()); err != nil {
			t.Fatalf("mend %s: %v", f.Name, err)
		}
	}
	if after := look(t, f.Name, p); after.Status != doctor.Pass {
		t.Errorf("mended, %s is %s: %s", f.Name, after.Status, after.Detail)
	}
}

func TestAllChecksAnswerInOrder(t *testing.T) {
	r := doctor.Look(t.Context(), doctor.Patient{
		Dir: "/nosuch/dir", Device: "ingot-nosuch", Networks: []netip.Prefix{netip.MustParsePrefix("192.168.10.0/25")},
	}, doctor.Checks())
	var got, want []string
	for _, c := range doctor.Checks() {
		want = append(want, c.Name)
	}
	ok := true
	for _, f := range r.Checks {
		got = append(got, f.Name)
		if f.Detail == "" || f.Wrong() && (f.Breaks == "" || f.Fix == "") {
			t.Errorf("%+v does not say all", f)
		}
		ok = ok && f.Status != doctor.Fail
	}
	if !slices.Equal(got, want) || r.OK != ok {
		t.Errorf("%v, %v; want %v, %v", got, r.OK, want, ok)
	}
	// What is left out for `ingot up` must not be able to stop it.
	for i, c := range doctor.Checks() {
		if r.Checks[i].Status == doctor.Fail && !c.Stop {
			t.Errorf("%s fails, and `ingot up` does not look", c.Name)
		}
	}
	var b strings.Builder
	if err := r.Text(&b); err != nil || strings.Count(b.String(), "\n") < len(want) {
		t.Errorf("%v:\n%s", err, b.String())
	}
}

// Whoever is not root learns that first, and no check fails for another reason
// than that it may not look.
func TestWithoutRoot(t *testing.T) {
	if os.Getenv("AGAIN") == "" {
		need.Root(t)
		nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		again(t, nobody)
		return
	}
	p := doctor.Patient{Dir: "/var/lib/ingot", Device: "ingot-nosuch"}
	f := look(t, "root", p)
	if f.Status != doctor.Fail || f.Fixable {
		t.Errorf("root: %+v", f)
	}
	if f := look(t, "kvm", p); f.Wrong() && strings.Contains(f.Detail, "may not open") && !strings.Contains(f.Fix, "sudo") {
		t.Errorf("kvm: %+v", f)
	}
	for _, name := range []string{"namespaces", "loop", "dhcp", "firewall"} {
		expect(t, name, p, doctor.Skip, "only root")
	}
}

func TestTun(t *testing.T) {
	needs(t)
	p := doctor.Patient{}
	expect(t, "tun", p, doctor.Pass, "/dev/net/tun")
	mount(t, "tmpfs", "/dev/net", "tmpfs", 0, "")
	mend(t, expect(t, "tun", p, doctor.Fail, "/dev/net/tun is missing"), p)
}

// A user namespace has limits of its own.
func TestNamespaceLimit(t *testing.T) {
	if os.Getenv("AGAIN") == "" {
		needs(t)
		how := &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}},
		}
		again(t, how)
		return
	}
	p := doctor.Patient{}
	expect(t, "namespaces", p, doctor.Pass, "network, mount and UTS")
	if err := os.WriteFile("/proc/sys/user/max_net_namespaces", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	mend(t, expect(t, "namespaces", p, doctor.Fail, "limit"), p)
}

func TestPackages(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // what is in /usr/sbin is found nevertheless
	f := expect(t, "packages", doctor.Patient{}, doctor.Fail, "qemu-system-x86_64")
	if f.Fixable || !strings.Contains(f.Fix, "qemu-system-x86") {
		t.Errorf("without apt-get: %+v", f)
	}
}
