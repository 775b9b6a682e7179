package vmmtest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
	"ingot/internal/vmm"
)

// life follows one guest: states, devices, console, agent, Attach, Stop.
func (s suite) life(t *testing.T) {
	dir := stateDir(t, "vmmtest-life")
	c := s.config(dir)
	c.User, c.VCPU = 64999, 2
	for _, id := range []string{"root", "data"} {
		c.Disks = append(c.Disks, vmm.Disk{ID: id, File: blank(t), ReadOnly: id == "data"})
	}
	for i, name := range []string{"vmmtest0", "vmmtest1"} {
		tap, err := link.OpenTap(name) // gone when all have closed it
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tap.Close() })
		c.NICs = append(c.NICs, vmm.NIC{ID: fmt.Sprintf("eth%d", i), File: tap, MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}})
	}
	began := time.Now()
	m := s.start(t, c)
	t.Logf("started in %v", time.Since(began).Round(time.Millisecond))
	s.expectPrivate(t, m, c)

	con := open(t, m, dir)
	t.Logf("the guest was ready after %v", time.Since(began).Round(time.Millisecond))
	con.tell(t, "echo one")
	con.hear(t, "echoed one")
	con.tell(t, "list")
	if got := con.hear(t, "disks "); got != "root data" {
		t.Errorf("disks %q, want them in order", got)
	}
	if got := con.hear(t, "nics "); got != "02:00:00:00:00:00 02:00:00:00:00:01" {
		t.Errorf("network cards %q, want them in order", got)
	}
	expectAgent(t, m)
	s.grow(t, m, con, c.Disks)
	s.pause(t, m, con)
	await(t, m, "its metrics to show that it runs", func() bool {
		con.tell(t, "echo work")
		con.hear(t, "echoed work")
		metrics, err := m.Metrics(t.Context())
		return err == nil && metrics.CPU > 0 && metrics.Resident > 0
	})

	if _, err := s.driver(t).Start(t.Context(), c); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second start in the same directory: %v", err)
	}
	con.shut()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	again, err := s.driver(t).Attach(within(t), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.PID() != m.PID() || !again.Started().Equal(m.Started()) || again.Started().IsZero() {
		t.Errorf("attached to process %d of %v, want %d of %v", again.PID(), again.Started(), m.PID(), m.Started())
	}
	con = open(t, again, dir)
	con.tell(t, "echo two")
	con.hear(t, "echoed two")
	s.stopTwice(t, again, dir)
}

const blankSize = 1 << 20

func blank(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(blankSize); err != nil {
		t.Fatal(err)
	}
	return f
}

// expectPrivate looks at the process from outside: its user, its session, and
// who may read its files.
func (s suite) expectPrivate(t *testing.T, m vmm.Machine, c vmm.Config) {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", m.PID()), &stat); err != nil || int(stat.Uid) != c.User {
		t.Errorf("process of user %d, want %d: %v", stat.Uid, c.User, err)
	}
	if sid, err := unix.Getsid(m.PID()); err != nil || sid != m.PID() {
		t.Errorf("process in session %d, want its own %d: %v", sid, m.PID(), err)
	}
	files, err := os.ReadDir(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("file %s has mode %v", f.Name(), info.Mode())
		}
	}
	for _, suffix := range []string{".cfg", ".pid", ".log", ".stdout", ".stderr", ".metrics"} {
		name := s.driver(t).Name() + suffix
		if !slices.ContainsFunc(files, func(f os.DirEntry) bool { return f.Name() == name }) {
			t.Errorf("there is no %s", name)
		}
	}
}

func expectAgent(t *testing.T, m vmm.Machine) {
	t.Helper()
	conn, err := m.Agent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	sent, got := []byte("a word to the agent"), make([]byte, 19)
	if _, err := conn.Write(sent); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != string(sent) {
		t.Errorf("the agent answers %q: %v", got, err)
	}
}

func (s suite) pause(t *testing.T, m vmm.Machine, con *console) {
	t.Helper()
	if !slices.Contains(s.driver(t).Features(), vmm.Pause) {
		return
	}
	expectState(t, m, vmm.Running)
	for range 2 { // again is no error
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	expectState(t, m, vmm.Paused)
	con.tell(t, "echo late") // not answered before Resume
	for range 2 {
		if err := m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	con.hear(t, "echoed late")
	expectState(t, m, vmm.Running)
}

func expectState(t *testing.T, m vmm.Machine, want vmm.State) {
	t.Helper()
	if got, err := m.State(within(t)); got != want || err != nil {
		t.Errorf("state %s, %v, want %s", got, err, want)
	}
}

// stopTwice stops, and stops what has stopped.
func (s suite) stopTwice(t *testing.T, m vmm.Machine, dir string) {
	t.Helper()
	began := time.Now()
	for i := range 2 {
		if err := m.Press(within(t)); err != nil && i == 0 {
			t.Error(err)
		}
		awaitEnd(t, m)
	}
	t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
	if exit := awaitEnd(t, m); exit.Cause != vmm.Stopped {
		t.Errorf("it ended as %+v", exit)
	}
	expectState(t, m, vmm.Dead)
	if err := m.Kill(); err != nil {
		t.Error(err)
	}
	s.expectEnded(t, dir, vmm.Stopped)
}

// expectEnded attaches to what has ended, and hears why.
func (s suite) expectEnded(t testing.TB, dir string, want vmm.Cause) {
	t.Helper()
	for range 2 { // the answer stays
		_, err := s.driver(t).Attach(within(t), dir)
		var ended *vmm.Ended
		if !errors.As(err, &ended) || !errdefs.IsNotFound(err) || ended.Exit.Cause != want || ended.Exit.At.IsZero() {
			t.Errorf("attach to what has ended: %v, want %s", err, want)
		}
	}
}
