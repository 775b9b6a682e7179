package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/rogpeppe/go-internal/testscript"

	"ingot/internal/need"
)

// The environments of these tests. They must not be the developer's.
const e2eEnv, debianEnv = "e2e", "e2e-debian"

// e2eScripts are the scripts of testdata/e2e in the order in which they run:
// the first brings the environment up, the last takes it down.
var e2eScripts = []string{"up", "ps", "run", "resize", "exec", "terminal", "image", "logs", "isolation", "ports", "vpn", "faults", "upgrade", "rm", "declare", "down"}

// TestE2E runs the program that `make build` makes, on an environment of its own.
func TestE2E(t *testing.T) {
	need.Time(t)
	need.Root(t)
	need.NetNS(t)
	need.Loop(t)
	need.QEMU(t)
	out, err := exec.Command("make", "-C", "../..", "build").CombinedOutput()
	if err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	bin := t.TempDir()
	program := filepath.Join(bin, "ingot")
	// A copy: whatever runs from it later was left behind by these tests.
	if out, err := exec.Command("cp", "../../bin/ingot", program).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	for _, name := range []string{"ctr", "dhcp-leases-list"} { // as `make build` has them
		if err := os.Symlink("ingot", filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	probe := filepath.Join(bin, "probe") // what isolation.txtar puts into guests
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", probe, "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	// The program as of another day: another version alone would not make it one.
	newer := filepath.Join(bin, "newer")
	build = exec.Command("go", "build", "-gcflags", "-N", "-ldflags", "-s -w -X main.version=newer", "-o", newer, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build another version: %v\n%s", err, out)
	}
	onlyOne(t)
	down := func() {
		for _, name := range []string{e2eEnv, debianEnv} {
			if out, err := exec.Command(program, "--env", name, "down").CombinedOutput(); err != nil {
				t.Errorf("down: %v\n%s", err, out)
			}
		}
	}
	down() // what an earlier run left behind
	t.Cleanup(down)
	run := func(script, environment string) bool {
		return t.Run(script, func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Files:               []string{"testdata/e2e/" + script + ".txtar"},
				RequireExplicitExec: true,
				Setup: func(e *testscript.Env) error {
					e.Setenv("INGOT_ENV", environment)
					e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH")+":/usr/sbin:/sbin")
					e.Setenv("PROGRAM", program)
					e.Setenv("PROBE", probe)
					e.Setenv("NEWER", newer)
					if script == "vpn" {
						removePeer()
						e.Defer(removePeer)
					}
					if script != "up" && environment == e2eEnv {
						e.Defer(func() { removeVMs(t, program) })
					}
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"eventually": scriptEventually,
					"jsonenv":    scriptJSONEnv,
					"mkimage":    scriptMkimage,
					"code":       scriptCode,
					"pty":        scriptPTY,
					"reboot":     scriptReboot,
				},
			})
		})
	}
	for _, script := range e2eScripts {
		if script == "down" { // other environments come and go beside this one
			run("debian", debianEnv)
			t.Run("killed", func(t *testing.T) { testKilled(t, program) })
			t.Run("tailscale", func(t *testing.T) { testTailscale(t, program) })
		}
		// One after the other: a script's faults must not be another's.
		if !run(script, e2eEnv) && script == "up" {
			t.Fatal("there is no environment for the other scripts")
		}
	}
}

// onlyOne waits for another run of these tests on this machine: it has the same
// environment. A fixed name lets a run clear away what a killed one has left.
func onlyOne(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "ingot-"+e2eEnv+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}

// removePeer ends the device of vpn.txtar, which is gone if the script succeeded: first
// the interface, since its process keeps the namespace.
func removePeer() {
	_ = exec.Command("sh", "-c", "ip -n e2e-peer link del e2epeer; ip netns del e2e-peer; ip link del e2e-peer").Run()
}

// removeVMs deletes what a script that failed has left.
func removeVMs(t *testing.T, program string) {
	out, err := exec.Command(program, "--env", e2eEnv, "ps", "-o", "json").Output()
	var vms []vmView
	if err != nil || json.Unmarshal(out, &vms) != nil {
		return // the environment is down
	}
	for _, vm := range vms {
		if !strings.HasPrefix(vm.Name, "vm-") { // those of `up`
			if out, err := exec.Command(program, "--env", e2eEnv, "rm", vm.UID).CombinedOutput(); err != nil {
				t.Errorf("rm %s: %v: %s", vm.Name, err, out)
			}
		}
	}
}

// scriptEventually is `eventually SECONDS REGEXP COMMAND…`: it runs the command
// until its standard output matches.
func scriptEventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: eventually SECONDS REGEXP COMMAND…")
	}
	seconds, err := strconv.Atoi(args[0])
	ts.Check(err)
	want, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	for deadline := time.Now().Add(time.Duration(seconds) * time.Second); ; {
		cmd := exec.Command(lookPath(ts, args[2]), args[3:]...)
		cmd.Dir, cmd.Env = ts.MkAbs("."), scriptEnv(ts)
		out, _ := cmd.Output()
		if want.Match(out) {
			ts.Logf("%s", out)
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("no match for %s after %d s, but:\n%s", args[1], seconds, out)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// scriptEnv is the environment that the script's commands have.
func scriptEnv(ts *testscript.TestScript) []string {
	env := os.Environ()
	for _, name := range []string{"INGOT_ENV", "PATH", "HOME"} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	return env
}

func lookPath(ts *testscript.TestScript, name string) string {
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if p := filepath.Join(dir, name); syscall.Access(p, 1) == nil {
			return p
		}
	}
	ts.Fatalf("there is no %s in PATH", name)
	return ""
}

// scriptJSONEnv is `jsonenv VARIABLE PATH`: it takes a value out of the last
// command's JSON, by keys and indices with dots between them.
func scriptJSONEnv(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: jsonenv VARIABLE PATH")
	}
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &v))
	for _, key := range strings.Split(args[1], ".") {
		switch in := v.(type) {
		case map[string]any:
			v = in[key]
		case []any:
			i, err := strconv.Atoi(key)
			if err != nil || i >= len(in) {
				ts.Fatalf("%s: a list of %d has no %s", args[1], len(in), key)
			}
			v = in[i]
		default:
			v = nil
		}
	}
	if v == nil {
		ts.Fatalf("there is no %s", args[1])
	}
	if n, ok := v.(float64); ok {
		v = strconv.FormatFloat(n, 'f', -1, 64)
	}
	ts.Setenv(args[0], fmt.Sprint(v))
}

// scriptCode is `code N COMMAND…`: the command must end with that exit code.
func scriptCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND…")
	}
	cmd := exec.Command(lookPath(ts, args[1]), args[2:]...)
	cmd.Dir, cmd.Env = ts.MkAbs("."), scriptEnv(ts)
	out, err := cmd.CombinedOutput()
	ts.Logf("%s", out)
	if cmd.ProcessState == nil {
		ts.Fatalf("%v", err)
	}
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// scriptPTY is `pty DIALOGUE CODE COMMAND…`: it runs the command on a terminal
// of its own. The file has lines `expect REGEXP`, `send TEXT` (with Go's escapes)
// and `size ROWS COLUMNS`.
func scriptPTY(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: pty DIALOGUE CODE COMMAND…")
	}
	cmd := exec.Command(lookPath(ts, args[2]), args[3:]...)
	cmd.Dir, cmd.Env = ts.MkAbs("."), append(scriptEnv(ts), "TERM=xterm")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	ts.Check(err)
	defer tty.Close()
	s := &screen{}
	read := make(chan struct{})
	go func() { defer close(read); _, _ = io.Copy(s, tty) }()
	defer func() { ts.Logf("%s", s.text()) }()
	lines := bufio.NewScanner(strings.NewReader(ts.ReadFile(args[0])))
	for lines.Scan() {
		verb, rest, _ := strings.Cut(lines.Text(), " ")
		switch verb {
		case "expect":
			if !s.expect(regexp.MustCompile("(?m)"+rest), time.Minute) {
				_ = cmd.Process.Kill()
				ts.Fatalf("no %s on the terminal", rest)
			}
		case "send":
			text, err := strconv.Unquote(`"` + rest + `"`)
			ts.Check(err)
			_, err = io.WriteString(tty, text)
			ts.Check(err)
		case "size":
			var w pty.Winsize
			_, err := fmt.Sscan(rest, &w.Rows, &w.Cols)
			ts.Check(err)
			ts.Check(pty.Setsize(tty, &w))
		}
	}
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	err = cmd.Wait()
	if !timer.Stop() {
		ts.Fatalf("it does not end: %v", err)
	}
	<-read
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("exit code %s, want %s", got, args[1])
	}
}

// screen is what a program wrote to its terminal.
type screen struct {
	mu   sync.Mutex // guards what is below
	all  bytes.Buffer
	seen int // what expect has gone past
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.Write(p)
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.String()
}

// expect waits until what came since the last expect matches.
func (s *screen) expect(want *regexp.Regexp, patience time.Duration) bool {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		at := want.FindIndex(s.all.Bytes()[s.seen:])
		if at != nil {
			s.seen += at[1]
		}
		s.mu.Unlock()
		if at != nil {
			return true
		}
	}
	return false
}
