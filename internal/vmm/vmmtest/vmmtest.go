// Package vmmtest is the suite that every hypervisor driver passes: what the
// contract of package vmm promises, tried with real guests. It owns no driver
// and no kernel; a driver's own test brings both.
package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ingot/internal/vmm"
)

// Guest is what the suite boots. Its only program is that of testdata/guest,
// which is told on the console what to do.
type Guest struct {
	Kernel, Initrd string
	Cmdline        []string
}

// patience is how long a guest may take to do anything. Guests that are
// translated take seconds to boot, more on a busy machine.
const patience = 90 * time.Second

// suite is a driver under test.
type suite struct {
	driver func(testing.TB) vmm.Driver
	guest  Guest
}

// Run holds a driver to the contract. The test that calls it is run again in a
// process of its own: it may call nothing else that must not happen twice.
func Run(t *testing.T, driver func(testing.TB) vmm.Driver, guest Guest) {
	s := suite{driver, guest}
	if dir := os.Getenv(envStart); dir != "" {
		s.startAndStay(t, dir)
		return
	}
	t.Run("Life", s.life)
	t.Run("Ends", s.ends)
	t.Run("Restart", s.restart)
	t.Run("FailedStart", s.failedStart)
	t.Run("CancelledStart", s.cancelledStart)
	t.Run("Several", s.several)
}

// config is a small guest's, in dir.
func (s suite) config(dir string) vmm.Config {
	return vmm.Config{
		UID: filepath.Base(dir), Dir: dir, VCPU: 1, Memory: 128,
		Kernel: s.guest.Kernel, Initrd: s.guest.Initrd,
		Cmdline: append([]string{"panic=-1", "quiet"}, s.guest.Cmdline...),
		Agent:   true,
	}
}

// stateDir is as deep as a real one: its path is longer than a socket's may be.
func stateDir(t testing.TB, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("a-long-way/", 10), name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (s suite) start(t testing.TB, c vmm.Config) vmm.Machine {
	t.Helper()
	m, err := s.driver(t).Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
		// The test may have closed m, and let another find it.
		if m, err := s.driver(t).Attach(context.Background(), c.Dir); err == nil {
			m.Kill()
			m.Close()
		}
		if t.Failed() {
			report(t, c.Dir)
		}
	})
	return m
}

// report shows what a guest left.
func report(t testing.TB, dir string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			t.Logf("%s:\n%s", filepath.Base(f), b[max(0, len(b)-3000):])
		}
	}
}

// console is a conversation with the guest's program.
type console struct {
	io.ReadWriteCloser
	lines  chan string
	reader sync.WaitGroup
}

// open connects to the console and waits until the guest listens: its first
// words may have come before there was a connection. Everything is read as it
// comes, since a hypervisor holds a guest up whose console nobody reads.
func open(t testing.TB, m vmm.Machine, dir string) *console {
	t.Helper()
	conn, err := m.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &console{ReadWriteCloser: conn, lines: make(chan string, 10000)}
	c.reader.Go(func() {
		defer close(c.lines)
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			c.lines <- strings.TrimRight(lines.Text(), "\r")
		}
	})
	t.Cleanup(c.shut)
	await(t, m, "the guest to be ready", func() bool {
		logs, _ := filepath.Glob(filepath.Join(dir, "*.stdout"))
		return slices.ContainsFunc(logs, func(f string) bool {
			b, _ := os.ReadFile(f)
			return bytes.Contains(b, []byte("guest ready"))
		})
	})
	return c
}

func (c *console) shut() {
	c.Close()
	c.reader.Wait()
}

// tell sends the guest a line.
func (c *console) tell(t testing.TB, words string) {
	t.Helper()
	if _, err := fmt.Fprintln(c, words); err != nil {
		t.Fatal(err)
	}
}

// hear waits for a line that begins as wanted, and returns the rest of it.
func (c *console) hear(t testing.TB, want string) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case line, ok := <-c.lines:
			if rest, found := strings.CutPrefix(line, want); found {
				return strings.TrimSpace(rest)
			}
			if !ok {
				t.Fatalf("wait for %q: the console was closed", want)
			}
		case <-deadline:
			t.Fatalf("wait for %q: no", want)
		}
	}
}

// await waits until something is so, or the machine ends.
func await(t testing.TB, m vmm.Machine, what string, is func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for !is() {
		select {
		case <-m.Done():
			t.Fatalf("wait for %s: it ended: %+v", what, m.Exit())
		case <-deadline:
			t.Fatalf("wait for %s: no", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// awaitEnd waits for the end of a microVM.
func awaitEnd(t testing.TB, m vmm.Machine) vmm.Exit {
	t.Helper()
	select {
	case <-m.Done():
		return m.Exit()
	case <-time.After(patience):
		t.Fatal("it does not end")
		panic("unreachable")
	}
}

// within is a context that ends with patience.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// boot starts several guests at once, since their boots take most of the time.
func (s suite) boot(t *testing.T, names ...string) (machines map[string]vmm.Machine, dirs map[string]string) {
	t.Helper()
	machines, dirs = map[string]vmm.Machine{}, map[string]string{}
	for _, name := range names {
		dirs[name] = stateDir(t, name)
		machines[name] = s.start(t, s.config(dirs[name]))
	}
	return machines, dirs
}
