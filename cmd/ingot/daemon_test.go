package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/need"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

// TestDaemon starts and ends the daemon as systemd and people do.
func TestDaemon(t *testing.T) {
	need.Time(t)
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *testMachine)
	}{
		{"first lines", firstLines},
		{"told to systemd", toldToSystemd},
		{"calls under way end", callsUnderWayEnd},
		{"a second signal", secondSignal},
		{"time to shut down", timeToShutDown},
		{"new certificates", newCertificates},
		{"starts that fail", startsThatFail},
		{"no pool", noPool},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, m)
			if !t.Failed() {
				m.expectNothing(t)
			}
		})
	}
}

func (m *testMachine) read(t *testing.T, log string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, log))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// end asks the daemon to end, and returns its exit code.
func (m *testMachine) end(t *testing.T) int {
	t.Helper()
	m.daemon.Process.Signal(syscall.SIGTERM)
	return m.code(t)
}

// code waits for the daemon's end, which comes soon, and is its exit code, or -1 if a
// signal ended it.
func (m *testMachine) code(t *testing.T) int {
	t.Helper()
	late := time.AfterFunc(30*time.Second, func() {
		t.Errorf("the daemon does not end")
		m.daemon.Process.Signal(syscall.SIGQUIT)
	})
	defer late.Stop()
	m.daemon.Wait()
	return m.daemon.ProcessState.ExitCode()
}

// endAtOnce tells the daemon twice.
func (m *testMachine) endAtOnce(t *testing.T) {
	t.Helper()
	before := strings.Count(m.read(t, "daemon.log"), "flintlockd ends: ")
	m.daemon.Process.Signal(syscall.SIGTERM)
	await(t, "the daemon to say that it ends", func() bool { return strings.Count(m.read(t, "daemon.log"), "flintlockd ends: ") > before })
	m.daemon.Process.Signal(syscall.SIGTERM)
	if code := m.code(t); code != -1 {
		t.Errorf("exit code %d", code)
	}
}

// with starts a daemon with more settings, as variables, and another log.
func (m *testMachine) with(t *testing.T, log string, variables ...string) {
	t.Helper()
	for _, v := range variables {
		key, value, _ := strings.Cut(v, "=")
		os.Setenv(key, value)
		defer os.Unsetenv(key)
	}
	m.daemon = m.start(t, log, "host", "--config", m.dir+"/config.yaml")
}

// firstLines are the page's, in its order where the page's daemon has one.
func firstLines(t *testing.T, m *testMachine) {
	m.end(t)
	m.with(t, "first.log", "FLINTLOCKD_VERBOSITY=9", "FLINTLOCKD_INSECURE_ENDPOINT=127.0.0.1:9191")
	m.list(t)
	log := m.read(t, "first.log")
	if !regexp.MustCompile(`^time="\S+" level=info msg="flintlockd, version=.*, built_on=.*, commit=.*"\n`).MatchString(log) {
		t.Errorf("it begins with %q", log[:min(len(log), 200)])
	}
	for _, want := range []string{
		`level=info msg="flintlockd grpc api server starting"`,
		`level=info msg="starting microvm controller"`,
		`level=info msg="starting microvm controller with \d+ workers" controller=microvm`,
		`level=info msg="resyncing microvm specs" controller=microvm`,
		`level=info msg="starting event listener" controller=microvm`,
		`level=warning msg="basic authentication is DISABLED"`,
		`level=warning msg="TLS is DISABLED"`,
		`level=debug msg="starting grpc server listening on endpoint 127.0.0.1:9090"`,
		`level=warning msg="TLS is DISABLED" endpoint="127.0.0.1:9191"`,
		`level=debug msg="starting grpc server listening on endpoint 127.0.0.1:9191"`,
	} {
		at := regexp.MustCompile(`(?m)^time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)" ` + want + `$`).FindStringIndex(log)
		if at == nil {
			t.Errorf("no %s, or not in order, in\n%s", want, log)
			continue
		}
		log = log[at[1]:]
	}
	health := grpc_health_v1.NewHealthClient(m.conn)
	if r, err := health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "ingot.v1.Host"}); err != nil || r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", r, err)
	}
	m.end(t)
	m.startDaemon(t)
}

// toldToSystemd is in systemd's place.
func toldToSystemd(t *testing.T, m *testMachine) {
	if code := m.end(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	next := func(most time.Duration) string {
		b := make([]byte, 1000)
		socket.SetReadDeadline(time.Now().Add(most))
		n, _ := socket.Read(b)
		return strings.ReplaceAll(string(b[:n]), "\n", " ")
	}
	m.with(t, "daemon.log", "NOTIFY_SOCKET="+m.dir+"/notify", "WATCHDOG_USEC=1000000")
	for _, want := range []string{
		"STATUS=waiting for containerd at /run/containerd/containerd.sock", "STATUS=looking for microVMs", "READY=1 STATUS=serving", "WATCHDOG=1", "WATCHDOG=1",
	} {
		if got := next(20 * time.Second); got != want {
			t.Errorf("told %q, want %q", got, want)
		}
	}
	m.list(t)
	m.daemon.Process.Signal(syscall.SIGSTOP)
	for next(100*time.Millisecond) != "" { // one may be under way
	}
	if got := next(1200 * time.Millisecond); got != "" {
		t.Errorf("one that stands still says %q", got)
	}
	m.daemon.Process.Signal(syscall.SIGCONT)
	m.daemon.Process.Signal(syscall.SIGTERM)
	for {
		got := next(20 * time.Second)
		if got == "WATCHDOG=1" {
			continue
		}
		if got != "STOPPING=1 STATUS=ending" {
			t.Errorf("told %q at the end", got)
		}
		break
	}
	if code := m.code(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	m.startDaemon(t)
}

// callsUnderWayEnd when the daemon does, and microVMs run on.
func callsUnderWayEnd(t *testing.T, m *testMachine) {
	stays, was := m.run(t, "stays")
	slow, _ := m.run(t, "slow", "hollow.slow=1s")
	watch, err := m.host.Watch(t.Context(), &ingotv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() {
		_, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: slow})
		stopped <- err
	}()
	m.await(t, slow, "stopping")
	began := time.Now()
	code := m.end(t)
	if err := <-stopped; err != nil || code != 0 {
		t.Errorf("stop: %v; exit code %d", err, code)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	for err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("watch: %v", err)
	}
	if n := len(m.hypervisors()); n != 1 {
		t.Errorf("%d hypervisors", n)
	}
	m.startDaemon(t)
	m.await(t, stays, "running")
	if now := m.status(t, stays); now.GetPid() != was.GetPid() {
		t.Errorf("process %d, before it was %d", now.GetPid(), was.GetPid())
	}
	m.remove(t, stays)
	m.remove(t, slow)
}

// secondSignal does not wait for a call.
func secondSignal(t *testing.T, m *testMachine) {
	uid, _ := m.run(t, "deaf", "hollow.deaf=1")
	stopped := make(chan error, 1)
	go func() {
		_, err := m.host.Stop(t.Context(), &ingotv1.StopRequest{Uid: uid, Timeout: durationpb.New(time.Minute)})
		stopped <- err
	}()
	m.await(t, uid, "stopping")
	began := time.Now()
	m.endAtOnce(t)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
	if err := <-stopped; status.Code(err) != codes.Unavailable {
		t.Errorf("stop: %v", err)
	}
	m.startDaemon(t)
	m.remove(t, uid)
}

// timeToShutDown is what a guest has that is deleted, where the daemon is told so.
func timeToShutDown(t *testing.T, m *testMachine) {
	const patience = 3 * time.Second
	m.end(t)
	m.with(t, "daemon.log", "FLINTLOCKD_DELETEMICROVM-TIMEOUT="+patience.String())
	m.list(t)
	for word, c := range map[string]struct {
		paused      bool
		least, most time.Duration
	}{
		"hollow.slow=700ms": {false, 700 * time.Millisecond, patience},
		"hollow.slow=701ms": {true, 701 * time.Millisecond, patience},
		"hollow.deaf=1":     {false, patience, patience + 3*time.Second},
	} {
		uid, _ := m.run(t, "going", word)
		if c.paused {
			if _, err := m.host.Pause(t.Context(), &ingotv1.PauseRequest{Uid: uid}); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		m.remove(t, uid)
		if took := time.Since(began); took < c.least || took > c.most {
			t.Errorf("%s, paused %v: it took %v", word, c.paused, took)
		}
	}
	m.end(t)
	m.startDaemon(t)
	uid, _ := m.run(t, "going", "hollow.deaf=1")
	began := time.Now()
	m.remove(t, uid)
	if took := time.Since(began); took > patience/2 {
		t.Errorf("without the setting it took %v", took)
	}
}

// newCertificates are in force without a restart, and profiles are where they are wanted.
func newCertificates(t *testing.T, m *testMachine) {
	m.end(t)
	var cas [2]*pki.CA
	for i := range cas {
		var err error
		if cas[i], err = pki.OpenCA(fmt.Sprintf("%s/ca%d", m.dir, i), "test"); err != nil {
			t.Fatal(err)
		}
	}
	server, client := m.dir+"/pki", m.dir+"/client"
	ensure := func(ca *pki.CA) {
		t.Helper()
		for _, dir := range []string{client, server} {
			if _, err := ca.Ensure(dir, "test", nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")}); err != nil {
				t.Fatal(err)
			}
		}
	}
	ensure(cas[0])
	f := pki.In(server)
	m.with(t, "tls.log", "FLINTLOCKD_INSECURE=false", "FLINTLOCKD_TLS_CERT="+f.Cert, "FLINTLOCKD_TLS_KEY="+f.Key,
		"FLINTLOCKD_TLS_CLIENT_VALIDATE=true", "FLINTLOCKD_TLS_CLIENT_CA="+f.CA, "FLINTLOCKD_DEBUG_ENDPOINT=127.0.0.1:6060")
	ask := func() error {
		conn, err := wire.Dial(wire.Target{Address: "127.0.0.1:9090", TLS: pki.In(client)})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = v1alpha1.NewMicroVMClient(conn).ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
		return err
	}
	await(t, "the daemon with TLS", func() bool { return ask() == nil })
	ensure(cas[1])
	await(t, "the new certificates", func() bool { return ask() == nil })
	if log := m.read(t, "tls.log"); !strings.Contains(log, "the new ones are in force") || strings.Contains(log, "DISABLED\" ") {
		t.Errorf("log: %s", log)
	}
	if _, err := m.vms.ListMicroVMs(t.Context(), &v1alpha1.ListMicroVMsRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("in plaintext: %v", err)
	}
	await(t, "a line about plaintext", func() bool {
		return strings.Contains(m.read(t, "tls.log"), `msg="a client speaks plaintext to a port that has TLS`)
	})
	for path, want := range map[string]int{"/debug/pprof/goroutine?debug=1": http.StatusOK, "/": http.StatusNotFound} {
		r, err := http.Get("http://127.0.0.1:6060" + path)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
	m.end(t)
	m.startDaemon(t)
}

// startsThatFail say why, in one line, and end with 1; one that is told to end before it
// serves has not failed.
func startsThatFail(t *testing.T, m *testMachine) {
	m.end(t)
	taken, err := net.Listen("tcp", "127.0.0.1:9090")
	if err != nil {
		t.Fatal(err)
	}
	m.with(t, "taken.log")
	if code := m.code(t); code != 1 {
		t.Errorf("port taken: exit code %d", code)
	}
	taken.Close()
	log := strings.TrimSpace(m.read(t, "taken.log"))
	if last := log[strings.LastIndex(log, "\n")+1:]; last != "ingot: services: grpc api: serve gRPC on 127.0.0.1:9090: listen tcp 127.0.0.1:9090: bind: address already in use" {
		t.Errorf("port taken: %s", last)
	}
	m.with(t, "nobody.log", "FLINTLOCKD_CONTAINERD_SOCKET="+m.dir+"/nobody.sock")
	await(t, "a line about containerd", func() bool {
		return strings.Contains(m.read(t, "nobody.log"), `level=warning msg="containerd does not answer: trying again"`)
	})
	if code := m.end(t); code != 0 {
		t.Errorf("told to end while it waits: exit code %d", code)
	}
	m.startDaemon(t)
}

// noPool: with a containerd that is not Ingot's the daemon takes flintlock's microVMs over,
// and says, when it starts and to who asks for another one, why it can't make any.
func noPool(t *testing.T, m *testMachine) {
	m.killDaemon()
	m.with(t, "nopool.log", "FLINTLOCKD_POOL="+m.dir+"/elsewhere")
	m.list(t)
	const why = "/elsewhere/pool is not there: `ingot containerd` makes it"
	if log := m.read(t, "nopool.log"); !strings.Contains(log, "level=warning msg=\"no new microVM can be made here\"") || !strings.Contains(log, why) {
		t.Errorf("the log:\n%s", log)
	}
	_, err := m.vms.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: spec("none")})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), why) {
		t.Errorf("create: %v", err)
	}
	m.killDaemon()
	m.startDaemon(t)
}

// TestContainerdStaysAway: a daemon does not wait for ever.
func TestContainerdStaysAway(t *testing.T) {
	c := defaultHostConfig()
	c.Containerd = t.TempDir() + "/nobody.sock"
	began := time.Now()
	_, err := c.openImages(t.Context(), slog.New(slog.DiscardHandler), 500*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "wait 500ms for containerd: dial unix "+c.Containerd+": connect: no such file") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took < 500*time.Millisecond || took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := c.openImages(ctx, slog.New(slog.DiscardHandler), time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// TestDefaultProvider: flintlock's configurations name a hypervisor that is not here.
func TestDefaultProvider(t *testing.T) {
	for given, want := range map[string]string{"": "", "qemu": "qemu", "firecracker": "", "cloudhypervisor": "", "vmware": "is not a hypervisor that is known"} {
		var log strings.Builder
		c := hostConfig{DefaultProvider: given}
		drivers, err := c.drivers(slog.New(slog.NewTextHandler(&log, nil)))
		if given == "vmware" {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", given, err)
			}
			continue
		}
		if err != nil || c.DefaultProvider != want || len(drivers) != 1 {
			t.Errorf("%q: %q, %v", given, c.DefaultProvider, err)
		}
		if said := strings.Contains(log.String(), "default-provider is not here"); said != (given != want) {
			t.Errorf("%q: said %v", given, said)
		}
	}
}

// TestUnitFile: what systemd must not do to hypervisors, and a command line that is one.
func TestUnitFile(t *testing.T) {
	const file = "../../packaging/flintlockd.service"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Type=notify", "KillMode=process", "OOMPolicy=continue", "Restart=always", "WatchdogSec=1min", "TasksMax=infinity",
		"Wants=containerd.service network-online.target", "After=containerd.service network-online.target", "WantedBy=multi-user.target",
	} {
		if !strings.Contains("\n"+string(text), "\n"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	line := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/flintlockd run(.*)$`).FindSubmatch(text)
	if line == nil {
		t.Fatal("it does not start flintlockd")
	}
	if unknown, err := parseHostFlags(hostCommand().Flags(), strings.Fields(string(line[1]))); unknown != nil || err != nil {
		t.Errorf("%s: %v, %v", line[0], unknown, err)
	}
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		return
	}
	out, _ := exec.Command(verify, "verify", file).CombinedOutput()
	for line := range strings.Lines(string(out)) { // of ours; the program need not be installed here
		if strings.Contains(line, "flintlockd.service") && !strings.Contains(line, "is not executable") {
			t.Errorf("systemd-analyze: %s", line)
		}
	}
}
