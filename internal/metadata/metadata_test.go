package metadata_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
	"ingot/internal/metadata"
	"ingot/internal/need"
	"ingot/internal/tests"
)

func TestMain(m *testing.M) { tests.Apart(m) }

// guest is a network namespace whose card is behind a device of the host's. All
// guests have the same addresses.
type guest struct{ ns int }

func newGuest(t *testing.T, device string) *guest {
	t.Helper()
	made := make(chan int)
	go func() {
		runtime.LockOSThread() // the thread, and its namespace, end with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
		}
		made <- fd
	}()
	g := &guest{<-made}
	t.Cleanup(func() { unix.Close(g.ns) })
	ip(t, "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), g.ns))
	t.Cleanup(func() { exec.Command("ip", "link", "del", device).Run() })
	ip(t, "link", "set", device, "up")
	if err := link.Metadata(device); err != nil {
		t.Fatal(err)
	}
	g.do(t, func() {
		ip(t, "link", "set", "eth0", "address", "aa:ff:00:00:00:01", "up")
		ip(t, "addr", "add", "169.254.0.1/16", "dev", "eth0")
	})
	return g
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Errorf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// do calls f on a thread in the guest's namespace.
func (g *guest) do(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Setns(g.ns, unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// get asks as the guest does.
func (g *guest) get(t *testing.T, path string, header ...string) (status int, body string) {
	t.Helper()
	conn := g.dial(t)
	if conn == nil {
		return 0, ""
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n%s\r\n", path, strings.Join(append(header, ""), "\r\n"))
	return read(t, conn)
}

func (g *guest) dial(t *testing.T) (conn net.Conn) {
	t.Helper()
	g.do(t, func() {
		// A numeric address is dialled on this thread.
		c, err := net.DialTimeout("tcp4", metadata.Address, 2*time.Second)
		if err != nil {
			t.Error(err)
			return
		}
		conn = c
	})
	if conn != nil {
		conn.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return conn
}

func read(t *testing.T, conn io.Reader) (status int, body string) {
	t.Helper()
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Error(err)
	}
	head, body, _ := strings.Cut(string(answer), "\r\n\r\n")
	fmt.Sscanf(head, "HTTP/1.0 %d", &status)
	return status, body
}

func serve(t *testing.T, device string, values map[string]string) *metadata.Server {
	t.Helper()
	s, err := metadata.Listen(t.Context(), device)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.Set(values)
	return s
}

func TestTwoGuestsWithTheSameAddress(t *testing.T) {
	need.NetNS(t)
	need.Binary(t, "ip")
	// The strictest setting that a machine may have.
	os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0)
	one, two := newGuest(t, "mdtest1"), newGuest(t, "mdtest2")
	first := serve(t, "mdtest1", map[string]string{"meta-data": "instance-id: one\n", "user-data": "#!/bin/sh\n", "vendor-data": "v"})
	serve(t, "mdtest2", map[string]string{"meta-data": "instance-id: two\n"})
	for range 3 {
		expect(t, one, "/latest/meta-data", 200, "instance-id: one\n")
		expect(t, two, "/latest/meta-data", 200, "instance-id: two\n")
	}
	expect(t, one, "/latest/", 200, "meta-data\nuser-data\nvendor-data\n")
	expect(t, one, "/latest", 200, "meta-data\nuser-data\nvendor-data\n")
	expect(t, one, "/latest/vendor-data", 200, "v")
	expect(t, one, "/latest/none", 404, "no such metadata: /latest/none\n")
	expect(t, one, "/latest/../etc/passwd", 404, "")
	expect(t, two, "/latest/user-data", 200, "#cloud-config\n{}\n")

	_, body := one.get(t, "/latest/", "Accept: application/json")
	var values map[string]string
	if err := json.Unmarshal([]byte(body), &values); err != nil || values["meta-data"] != "instance-id: one\n" || len(values) != 3 {
		t.Errorf("as JSON: %q: %v", body, err)
	}

	first.Set(map[string]string{"meta-data": "new"})
	expect(t, one, "/latest/meta-data", 200, "new")
	expect(t, one, "/latest/vendor-data", 200, "")

	first.Close()
	again := serve(t, "mdtest1", nil) // at once
	expect(t, one, "/latest/user-data", 200, "#cloud-config\n{}\n")
	expect(t, two, "/latest/meta-data", 200, "instance-id: two\n")
	again.Close()
}

func expect(t *testing.T, g *guest, path string, status int, body string) {
	t.Helper()
	if gotStatus, got := g.get(t, path); gotStatus != status || body != "" && got != body {
		t.Errorf("%s: %d %q, want %d %q", path, gotStatus, got, status, body)
	}
}

func TestGuestCannotTakeMuch(t *testing.T) {
	need.NetNS(t)
	need.Binary(t, "ip")
	g := newGuest(t, "mdtest3")
	s := serve(t, "mdtest3", map[string]string{"meta-data": "x"})

	long := g.dial(t)
	defer long.Close()
	fmt.Fprintf(long, "GET /latest/meta-data HTTP/1.0\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", 64<<10))
	// The rest of it is not read, so the answer may be lost in a reset.
	if answer, err := io.ReadAll(long); err == nil && !strings.HasPrefix(string(answer), "HTTP/1.1 431") {
		t.Errorf("a long header: %q", answer)
	}
	conn := g.dial(t)
	defer conn.Close()
	fmt.Fprintf(conn, "PUT /latest/meta-data HTTP/1.0\r\nContent-Length: 1000000000\r\n\r\n")
	if status, _ := read(t, conn); status != http.StatusMethodNotAllowed {
		t.Errorf("a write: status %d", status)
	}
	// Connections that say nothing hold others up once there are as many as a guest
	// may have, until one of them ends, and they don't hold up Close.
	var silent []net.Conn
	for range 16 {
		expect(t, g, "/latest/meta-data", 200, "x")
		if c := g.dial(t); c != nil {
			silent = append(silent, c)
			defer c.Close()
		}
	}
	late := g.dial(t)
	defer late.Close()
	fmt.Fprint(late, "GET /latest/meta-data HTTP/1.0\r\n\r\n")
	late.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := late.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one more than the guest may have is answered: %d bytes, %v", n, err)
	}
	silent[0].Close()
	late.SetReadDeadline(time.Now().Add(20 * time.Second))
	if status, body := read(t, late); status != 200 || body != "x" {
		t.Errorf("after another has ended: %d %q", status, body)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestListenNeedsItsDevice(t *testing.T) {
	need.NetNS(t)
	if s, err := metadata.Listen(t.Context(), "mdtest-none"); err == nil {
		s.Close()
		t.Error("it listens on a device that does not exist")
	}
}
