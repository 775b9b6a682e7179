package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ingot/internal/dhcp"
	"ingot/internal/need"
)

// A longer campaign: `go test -run TestHubKilled -hub.every 1`.
var hubEvery = flag.Int("hub.every", 97, "kill the hub before every n-th step")

// TestHubKilled kills the hub before each step of all that it does, from its start to
// an orderly end: the steps are its system calls that change something. The first
// time there is nothing of an earlier hub, and again there is what one that was
// killed has left. However far it got, what it had said is true, on disk and of
// the next hub, which finds nothing in its way, clears up what is half done, and
// does all of it.
func TestHubKilled(t *testing.T) {
	need.Time(t)
	need.Binary(t, "busybox")
	need.Binary(t, "nft")
	if !onMachine(t) {
		return
	}
	s := newSegment(t)
	s.reference(t)
	for _, start := range []string{"first", "again"} {
		t.Run(start, func(t *testing.T) {
			began, rounds, step := time.Now(), 0, 1
			var before promises
			var made time.Time
			for ; ; step += *hubEvery {
				rounds++
				if start == "again" && time.Since(made) > 4*time.Minute { // leases would end
					s.empty(t)
					before, made = s.halfDone(t), time.Now()
					s.save(t)
				}
				s.restore(t, start == "again")
				p := before.clone()
				killed := s.killBefore(t, step, p)
				if t.Failed() {
					t.Fatalf("step %d: %s", step, killed)
				}
				if killed == "" {
					break
				}
				s.converge(t, p)
				if t.Failed() {
					t.Fatalf("killed before step %d: %s", step, killed)
				}
			}
			slices.Sort(s.took)
			if s.took[len(s.took)/2] > time.Second {
				t.Errorf("hubs served after %v", s.took)
			}
			t.Logf("%d of %d steps in %v; the next hub served within %v, or %v in the middle",
				rounds-1, step-1, time.Since(began).Round(time.Millisecond), s.took[len(s.took)-1], s.took[len(s.took)/2])
			s.took = nil
		})
	}
}

// killBefore has a hub work, kills it before its step of that number, and says
// what that was; it is empty if the hub came to its end before.
func (s *segment) killBefore(t *testing.T, step int, p promises) (killed string) {
	t.Helper()
	h := s.start(t, step)
	err := h.work(p)
	if err == nil {
		err = h.stop()
	}
	if err != nil {
		select {
		case <-h.ended:
		case <-time.After(2 * time.Second): // it is not the kill
			h.cmd.Process.Kill()
		}
	}
	<-h.ended
	for line := range h.steps {
		killed = strings.TrimPrefix(line, "killed before ")
	}
	if err := h.tracer.Wait(); err != nil {
		t.Errorf("tracer: %v", err)
	}
	s.endClients(t)
	if killed == "" && err != nil {
		t.Errorf("%v\n%s", err, h.log.String())
	}
	return killed
}

// converge is what must be so after a hub was killed.
func (s *segment) converge(t *testing.T, p promises) {
	t.Helper()
	s.files(t, p)
	began := time.Now()
	h := s.start(t, 0)
	defer h.kill()
	err := h.serves()
	s.took = append(s.took, time.Since(began).Round(time.Millisecond))
	if err == nil {
		err = h.keeps(p)
	}
	s.nothingLeft(t)
	s.sameNetwork(t)
	if n := hubs(); n != 1 {
		t.Errorf("%d hubs run", n)
	}
	if err == nil {
		err = h.work(p)
	}
	if err == nil {
		err = h.keeps(p)
	}
	if err == nil {
		err = h.stop()
	}
	s.endClients(t)
	if log := h.log.String(); err != nil || strings.Contains(log, "level=warning") || strings.Contains(log, "level=error") {
		t.Errorf("the next hub: %v\n%s", err, log)
	}
	if n := hubs(); n != 0 {
		t.Errorf("%d hubs run after the end", n)
	}
	s.files(t, p)
	s.sameNetwork(t)
}

// reference has a hub come and go undisturbed, and remembers what is there then.
func (s *segment) reference(t *testing.T) {
	t.Helper()
	h := s.start(t, 0)
	defer h.kill()
	if err := errors.Join(h.serves(), h.keeps(promises{})); err != nil {
		t.Fatalf("%v\n%s", err, h.log.String())
	}
	s.network = s.look(t)
	for _, file := range exports {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		s.exported[file] = string(b)
	}
	if !strings.Contains(s.network, "masquerade") || !strings.Contains(s.exported["/etc/dhcp/dhcpd.conf"], "range 192.168.10.26 192.168.10.126;") {
		t.Fatalf("the hub has set nothing up: %s\n%v", s.network, s.exported)
	}
}

// halfDone is what a hub has promised that was killed after its work, and in the middle
// of a push.
func (s *segment) halfDone(t *testing.T) promises {
	t.Helper()
	h := s.start(t, 0)
	defer s.endClients(t)
	defer h.kill()
	p := promises{}
	if err := errors.Join(h.work(p), h.beginPush()); err != nil {
		t.Fatalf("%v\n%s", err, h.log.String())
	}
	return p
}

// exports are files that the hub writes for people and scripts, beside the lease log.
var exports = []string{"/etc/dhcp/dhcpd.conf", "/etc/default/isc-dhcp-server"}

// files reads what is on disk while no hub runs: the leases that were acknowledged are
// there, those that were released are not, and no file is torn.
func (s *segment) files(t *testing.T, p promises) {
	t.Helper()
	leases, err := dhcp.ReadLeases("/var/lib/dhcp/dhcpd.leases")
	if err != nil {
		t.Fatal(err)
	}
	active := promises{}
	for _, l := range leases {
		if l.State == dhcp.Active {
			active["lease "+l.MAC.String()] = l.IP.String()
			p.last(t.Errorf, "on disk", l.MAC.String(), l.Ends)
		}
	}
	p.hold(t.Errorf, "on disk", "lease ", active)
	for _, file := range exports {
		b, err := os.ReadFile(file)
		if !errors.Is(err, fs.ErrNotExist) && (err != nil || string(b) != s.exported[file]) {
			t.Errorf("%s: %v %q", file, err, b)
		}
	}
}

// nothingLeft finds the files of a hub that serves, and no more.
func (s *segment) nothingLeft(t *testing.T) {
	t.Helper()
	want := append([]string{"/var/lib/dhcp/dhcpd.leases", "/var/lib/dhcp/dhcpd.leases.lock"}, exports...)
	for _, dir := range hubDirs[:3] {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !slices.Contains(want, path) {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	err := filepath.WalkDir(hubDirs[3], func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == hubDirs[3] {
			return err
		}
		if d.IsDir() {
			inside, err := os.ReadDir(path)
			if len(inside) == 0 && path != hubDirs[3]+"/docker" {
				t.Errorf("left behind, and empty: %s", path)
			}
			return err
		}
		if name := d.Name(); strings.Contains(path, "/_uploads/") || name != "data" && name != "link" {
			t.Errorf("left behind: %s", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// look is what the kernel has of the hub: rules, addresses, forwarding.
func (s *segment) look(t *testing.T) string {
	t.Helper()
	return sh(t, "nft list ruleset; ip -o addr show | sed 's/ valid_lft.*//'; sysctl -n net.ipv4.conf.segment.forwarding net.ipv4.conf.uplink.forwarding")
}

func (s *segment) sameNetwork(t *testing.T) {
	t.Helper()
	if now := s.look(t); now != s.network {
		t.Errorf("the network is\n%s\nand was\n%s", now, s.network)
	}
}

// hubs counts those that run.
func hubs() (n int) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		b, _ := os.ReadFile(path) // empty of a zombie
		if strings.Contains(string(b), "ingot\x00hub\x00") && !strings.HasPrefix(string(b), "sh\x00") {
			n++
		}
	}
	return n
}

func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// promises are what a hub has told: what of, and its answer, which is empty if that
// is no more. What was asked for and not answered is not among them, for it may be
// either way.
type promises map[string]string

func (p promises) clone() promises {
	c := promises{}
	for what, answer := range p {
		c[what] = answer
	}
	return c
}

// keep asks for something, and remembers the answer if there is one.
func (p promises) keep(what string, ask func() (answer string, err error)) error {
	delete(p, what)
	answer, err := ask()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	p[what] = answer
	return nil
}

// hold compares the promises of a kind with what is.
func (p promises) hold(wrong func(string, ...any), where, kind string, is promises) {
	for what, answer := range p {
		if strings.HasPrefix(what, kind) && is[what] != answer {
			wrong("%s: %s is %q, and was promised to be %q", where, what, is[what], answer)
		}
	}
}

// lasting remembers that a card got a lease of the usual length after a time.
func (p promises) lasting(mac string, asked time.Time) {
	p["until "+mac] = asked.Add(10 * time.Minute).UTC().Format(time.RFC3339)
}

// last compares the end of a lease with what its card was told.
func (p promises) last(wrong func(string, ...any), where, mac string, ends time.Time) {
	if is := ends.UTC().Format(time.RFC3339); is < p["until "+mac] {
		wrong("%s: the lease of %s ends at %s, and was promised until %s", where, mac, is, p["until "+mac])
	}
}
