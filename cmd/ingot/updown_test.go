package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// A longer campaign: `go test -run TestE2E -updown.every 10`.
var upDownEvery = flag.Int("updown.every", 80, "kill `ingot up` and `ingot down` before every n-th step")

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

// testKilled kills `ingot up` before a step, and then before a later one, until it
// gets through; then `ingot down`, after which `up` must bring all back, and at
// last `down` until it gets through. Steps are system calls that change something.
func testKilled(t *testing.T, program string) {
	k := victim{t: t, program: program, file: filepath.Join(t.TempDir(), "env.yaml")}
	if err := os.WriteFile(k.file, []byte(killFile), 0o600); err != nil {
		t.Fatal(err)
	}
	k.run("down") // of a test that was killed
	t.Cleanup(func() { k.run("down") })

	kills := k.killThrough(1, "up", "-f", k.file)
	t.Logf("up was killed before it got through: %s", strings.Join(kills, ", "))
	k.green()
	before := k.vm()

	uids := []string{before.UID}
	for i, step := range []int{*upDownEvery / 8, *upDownEvery} {
		// Half-way down, and up again.
		killed := k.killBefore(step, "down")
		k.run("up", "-f", k.file)
		k.green()
		after := k.vm()
		t.Logf("down was killed %s: the microVM is the same: %v", killed, after.UID == before.UID)
		if i == 0 && killed == "" {
			t.Errorf("down had no %d steps", step)
		}
		if after.UID == before.UID && after.IP != before.IP {
			t.Errorf("the microVM had %s, and has %s", before.IP, after.IP)
		}
		before = after
		uids = append(uids, after.UID)
	}

	k.twoAtOnce()
	loops := k.loops()

	kills = k.killThrough(*upDownEvery/4, "down")
	t.Logf("down was killed before it got through: %s", strings.Join(kills, ", "))
	k.nothingLeft(loops, uids...)
}

// victim is one environment that is killed.
type victim struct {
	t       *testing.T
	program string
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

// killThrough kills a command before a step, and then later and later ones, until it
// is done, and says before what it was killed.
func (k *victim) killThrough(first int, args ...string) (kills []string) {
	k.t.Helper()
	for step := first; ; step += *upDownEvery {
		killed := k.killBefore(step, args...)
		if killed == "" {
			return kills
		}
		kills = append(kills, killed)
	}
}

// killBefore kills a command before its step of that number, and says what that
// was; it is empty if the command was done before.
func (k *victim) killBefore(step int, args ...string) (killed string) {
	k.t.Helper()
	// It begins when the tracer follows it.
	c := exec.Command("sh", "-c", `read -r begin && exec "$@"`, "sh", k.program, "--env", killEnv)
	c.Args = append(c.Args, args...)
	begin, err := c.StdinPipe()
	if err != nil {
		k.t.Fatal(err)
	}
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	if err := c.Start(); err != nil {
		k.t.Fatal(err)
	}
	follower, lines := startTracer(k.t, c.Process.Pid, step, c.Process.Pid)
	fmt.Fprintln(begin, "begin")
	for lines.Scan() {
		killed = fmt.Sprintf("before step %d, %s", step, strings.TrimPrefix(lines.Text(), "killed before "))
	}
	if err := follower.Wait(); err != nil {
		k.t.Errorf("tracer: %v", err)
	}
	if err := c.Wait(); err != nil && killed == "" {
		k.t.Fatalf("%v: %v\n%s", args, err, said.String())
	}
	return killed
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
	const waits = "another `ingot --env " + killEnv + " up` or `down` of " + killEnv + " is at work: waiting for it"
	if n := strings.Count(string(said[0])+string(said[1]), waits); n != 1 {
		k.t.Errorf("%d of two waited for the other:\n%s\n%s", n, said[0], said[1])
	}
}

// loops are the inodes of the environment's files that are loop devices, as a pattern.
// The kernel has their paths as they are inside the machines.
func (k *victim) loops() string {
	k.t.Helper()
	out, err := exec.Command("sh", "-c", "find /var/lib/ingot/"+killEnv+" -type f -size +16M -printf '%i\\n' | grep -xFf - /dev/fd/3 3<<END\n$(losetup -n -O BACK-INO -a | tr -d ' ')\nEND").Output()
	if err != nil || len(out) == 0 {
		k.t.Fatalf("the environment has no loop device: %v", err)
	}
	return strings.Join(strings.Fields(string(out)), "|")
}

// nothingLeft looks for traces of the environment.
func (k *victim) nothingLeft(loops string, uids ...string) {
	k.t.Helper()
	look := func(what, script string) {
		k.t.Helper()
		out, _ := exec.Command("sh", "-c", script).Output()
		if len(out) > 0 {
			k.t.Errorf("%s left behind:\n%s", what, out)
		}
	}
	look("files", "ls -d /run/ingot/"+killEnv+"* /var/lib/ingot/*"+killEnv+" /var/lib/ingot/.*"+killEnv+" 2>/dev/null")
	look("interfaces", "ip -o link | grep ingot-"+killEnv+"; ip route | grep ingot-"+killEnv)
	look("mounts", "grep '/"+killEnv+"[/ ]' /proc/self/mountinfo")
	look("loop devices", "losetup -n -O BACK-INO -a | grep -wE '"+loops+"'")
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
