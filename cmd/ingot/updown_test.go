package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// A longer campaign: `go test -run TestE2E -kill.seed 7 -updown.rounds 50`.
var upDownRounds = flag.Int("updown.rounds", 2, "how often `ingot down` is killed half-way before `up` must bring all back")

// killEnv stands beside the environment of the scripts.
const killEnv = e2eEnv + "-kill"

const killFile = `
format: 2
machines:
  - {name: one, roles: [hub, host]}
  - {name: two, roles: [host]}
microvms:
  - {name: a, image: busybox, host: two, memory: 128}
`

// testKilled kills `ingot up` again and again, each time some steps further than
// the last, until it gets through; and `ingot down` the same way.
func testKilled(t *testing.T, program string) {
	k := victim{t: t, program: program, random: rand.New(rand.NewPCG(*killSeed, 0)), file: filepath.Join(t.TempDir(), "env.yaml")}
	if err := os.WriteFile(k.file, []byte(killFile), 0o600); err != nil {
		t.Fatal(err)
	}
	k.run("down") // of a test that was killed
	t.Cleanup(func() { k.run("down") })

	kills := 0
	for line := 1; !k.killAfterLine(line, "up", "-f", k.file); line += 3 {
		kills++
	}
	t.Logf("up was killed %d times before it got through", kills)
	k.green()
	before := k.vm()

	uids := []string{before.UID}
	for range *upDownRounds {
		// Half-way down, and up again.
		moment := time.Duration(k.random.Int64N(int64(300 * time.Millisecond)))
		k.killAfter(moment, "down")
		k.run("up", "-f", k.file)
		k.green()
		after := k.vm()
		t.Logf("down was killed after %v: the microVM is the same: %v", moment, after.UID == before.UID)
		if after.UID == before.UID && after.IP != before.IP {
			t.Errorf("the microVM had %s, and has %s", before.IP, after.IP)
		}
		before = after
		uids = append(uids, after.UID)
	}

	k.twoAtOnce()

	kills = 0
	for delay := time.Duration(0); !k.killAfter(delay, "down"); delay += 150 * time.Millisecond {
		kills++
	}
	t.Logf("down was killed %d times before it got through", kills)
	k.nothingLeft(uids...)
}

// victim is one environment that is killed.
type victim struct {
	t       *testing.T
	program string
	random  *rand.Rand
	file    string
}

func (k *victim) command(args ...string) *exec.Cmd {
	return exec.Command(k.program, append([]string{"--env", killEnv}, args...)...)
}

func (k *victim) run(args ...string) string {
	k.t.Helper()
	out, err := k.command(args...).CombinedOutput()
	if err != nil {
		k.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// killAfterLine kills a command a moment after it has said so many lines, and says
// whether it was done before that.
func (k *victim) killAfterLine(line int, args ...string) (done bool) {
	k.t.Helper()
	c := k.command(args...)
	said, err := c.StderrPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		k.t.Fatal(err)
	}
	var text bytes.Buffer
	lines := bufio.NewScanner(said)
	for n := 1; lines.Scan(); n++ {
		fmt.Fprintln(&text, lines.Text())
		if n == line {
			moment := time.Duration(k.random.Int64N(int64(300 * time.Millisecond)))
			defer time.AfterFunc(moment, func() { _ = c.Process.Kill() }).Stop()
		}
	}
	return k.ended(c, c.Wait(), text.String())
}

// killAfter is killAfterLine by the clock.
func (k *victim) killAfter(moment time.Duration, args ...string) (done bool) {
	k.t.Helper()
	c := k.command(args...)
	var text bytes.Buffer
	c.Stderr = &text
	if err := c.Start(); err != nil {
		k.t.Fatal(err)
	}
	defer time.AfterFunc(moment, func() { _ = c.Process.Kill() }).Stop()
	return k.ended(c, c.Wait(), text.String())
}

// ended says whether a command is done; it must be that, or killed.
func (k *victim) ended(c *exec.Cmd, err error, text string) bool {
	k.t.Helper()
	if err == nil {
		return true
	}
	if s, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || !s.Signaled() {
		k.t.Fatalf("%v: %v\n%s", c.Args[3:], err, text)
	}
	return false
}

// green is what an environment must be, whatever was killed before.
func (k *victim) green() {
	k.t.Helper()
	k.run("inspect", "--wait", "60s")
	if out := k.run("up", "--dry-run"); !strings.Contains(out, "nothing to change") {
		k.t.Errorf("there is still something to change:\n%s", out)
	}
	out, err := exec.Command("pgrep", "-c", "-f", "lab supervise /run/ingot/"+killEnv+"$").Output()
	if got := strings.TrimSpace(string(out)); got != "1" {
		k.t.Errorf("%s supervisors run, want 1 (%v)", got, err)
	}
}

// vm is the environment's only microVM.
func (k *victim) vm() vmView {
	k.t.Helper()
	out, err := k.command("ps", "-o", "json").Output()
	var all []vmView
	if err == nil {
		err = json.Unmarshal(out, &all)
	}
	if err != nil || len(all) != 1 || all[0].Host != "two" {
		k.t.Fatalf("%v: %s", err, out)
	}
	return all[0]
}

// twoAtOnce starts two `up`s: one waits for the other, and says so.
func (k *victim) twoAtOnce() {
	k.t.Helper()
	var said [2][]byte
	var both sync.WaitGroup
	for i := range said {
		both.Go(func() {
			var err error
			if said[i], err = k.command("up", "-f", k.file).CombinedOutput(); err != nil {
				k.t.Errorf("%v\n%s", err, said[i])
			}
		})
	}
	both.Wait()
	const waits = "another `ingot up` or `down` of " + killEnv + " is at work: waiting for it"
	if n := strings.Count(string(said[0])+string(said[1]), waits); n != 1 {
		k.t.Errorf("%d of two waited for the other:\n%s\n%s", n, said[0], said[1])
	}
}

// nothingLeft looks for traces of the environment.
func (k *victim) nothingLeft(uids ...string) {
	k.t.Helper()
	look := func(what, script string) {
		k.t.Helper()
		out, _ := exec.Command("sh", "-c", script).Output()
		if len(out) > 0 {
			k.t.Errorf("%s left behind:\n%s", what, out)
		}
	}
	look("files", "ls -d /run/ingot/"+killEnv+"* /var/lib/ingot/*"+killEnv+" 2>/dev/null")
	look("interfaces", "ip -o link | grep ingot-"+killEnv+"; ip route | grep ingot-"+killEnv)
	look("mounts", "grep '/"+killEnv+"[/ ]' /proc/self/mountinfo")
	look("loop devices", "losetup -n -O BACK-FILE -a | grep /var/lib/ingot/"+killEnv)
	look("nftables", "nft list tables | grep ingot-"+killEnv)
	look("supervisors", "pgrep -a -f 'lab supervise /run/ingot/"+killEnv+"$'")
	for _, uid := range uids {
		look("hypervisors", "pgrep -a -f [q]emu.*"+uid)
	}
}

// scriptReboot is `reboot`: what the script's environment has outside of /var/lib is
// gone, at once and unasked, as after a power failure.
func scriptReboot(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: reboot")
	}
	name := ts.Getenv("INGOT_ENV")
	dir := "/run/ingot/" + name
	for killed := 1; killed > 0; {
		killed = 0
		for _, pid := range processesOf(dir, ts.Getenv("PROGRAM")) {
			if unix.Kill(pid, unix.SIGKILL) == nil {
				killed++
			}
		}
	}
	for unix.Unmount(dir, unix.MNT_DETACH) == nil {
	}
	ts.Check(os.RemoveAll(dir))
	for _, c := range [][]string{{"ip", "link", "delete", "ingot-" + name}, {"nft", "delete", "table", "ip", "ingot-" + name}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			ts.Fatalf("%v: %v: %s", c, err, out)
		}
	}
}

// processesOf are the supervisor and all that runs in the machines whose
// namespaces are pinned in dir. A zombie is none.
func processesOf(dir, program string) []int {
	ours := map[uint64]bool{}
	pins, _ := filepath.Glob(dir + "/ns/*/net")
	for _, pin := range pins {
		var s unix.Stat_t
		if unix.Stat(pin, &s) == nil {
			ours[s.Ino] = true
		}
	}
	var found []int
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, path := range all {
		var pid int
		var s unix.Stat_t
		_, err := fmt.Sscan(filepath.Base(path), &pid)
		if err != nil || unix.Stat(path+"/ns/net", &s) != nil {
			continue
		}
		exe, err := os.Readlink(path + "/exe")
		line, _ := os.ReadFile(path + "/cmdline")
		if err == nil && (ours[s.Ino] || strings.HasPrefix(exe, program) && strings.Contains(string(line), dir)) {
			found = append(found, pid)
		}
	}
	return found
}
