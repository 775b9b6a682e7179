package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ingot/internal/need"
)

// inNetwork runs a test on a thread that has a network namespace for itself.
func inNetwork(t *testing.T, f func(sh func(string))) {
	t.Helper()
	need.Root(t)
	need.NetNS(t)
	need.Binary(t, "ip")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f(func(line string) {
			if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", line, err, out)
			}
		})
	}()
	<-done
}

// TestForwardingOfOthersStays switches forwarding on for a lab, has somebody else
// switch it on for the whole machine, as Docker does, and takes the lab down.
func TestForwardingOfOthersStays(t *testing.T) {
	l := New(Config{Name: "f", RunDir: filepath.Join(t.TempDir(), "f")})
	for others, want := range map[string]string{"": "0", "echo 1 >/proc/sys/net/ipv4/ip_forward": "1"} {
		inNetwork(t, func(sh func(string)) {
			sh("echo 0 >/proc/sys/net/ipv4/ip_forward; ip link set lo up")
			if changed, err := l.forward(t.Context(), "lo"); err != nil || !changed {
				t.Errorf("changed %v, %v", changed, err)
			}
			sh(others)
			if err := l.restoreForwarding(t.Context()); err != nil {
				t.Error(err)
			}
			sh("test $(cat /proc/sys/net/ipv4/conf/lo/forwarding) = " + want)
		})
	}
}

func TestUplinks(t *testing.T) {
	inNetwork(t, func(sh func(string)) {
		sh(`for i in 1 2; do ip link add d$i type veth peer name p$i; ip link set p$i up; ip address add 10.0.$i.1/24 dev d$i; ip link set d$i up; done
			ip route add default nexthop via 10.0.1.2 dev d1 nexthop via 10.0.2.2 dev d2
			ip route add default via 10.0.1.3 metric 7
			ip route add unreachable default metric 9`)
		names, err := Uplinks()
		if err != nil || !slices.Equal(names, []string{"d1", "d2"}) {
			t.Errorf("%q, %v", names, err)
		}
	})
}

// TestBuildID builds a program as it is, with another version stamped on it, and
// from other sources.
func TestBuildID(t *testing.T) {
	need.Binary(t, "go")
	dir := t.TempDir()
	build := func(text, version string) string {
		t.Helper()
		for name, text := range map[string]string{"go.mod": "module m\n", "main.go": "package main\n\nvar version string\n\nfunc main() { println(version, " + text + ") }\n"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+version, "-o", "m", ".")
		c.Dir, c.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		id, err := buildID(filepath.Join(dir, "m"))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := build("1", "a")
	if other := build("1", "b"); other != first {
		t.Errorf("of another version it is another program: %s, %s", first, other)
	}
	if other := build("2", "a"); other == first {
		t.Errorf("of other sources it is the same program: %s", other)
	}
}
