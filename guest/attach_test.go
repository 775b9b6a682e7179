package guest_test

import (
	"strings"
	"testing"

	"ingot/internal/agent"
)

// A process that waits for a host is that one's: its streams, its end.
func TestAttach(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{
		"args": []string{"sh", "-c", "read line; echo $line from $(pwd) as $(id -un) with $A$B; echo aside >/dev/stderr; exit 7"},
		"env":  map[string]string{"A": "1", "B": "2"}, "dir": "/srv/made", "user": "daemon", "attach": true,
	})})
	vm.await(t, kind(agent.Ready))
	// What else is run has the same surroundings.
	if _, out, _ := vm.run(t, sh("echo $(pwd) $(id -un) $A$B >/dev/stdout"), nil); out != "/srv/made daemon 12\n" {
		t.Errorf("a command: %q", out)
	}
	own := sh("echo $(pwd) $(id -un) $A$B $(ulimit -n) $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)")
	own.User, own.Dir, own.Env = "0", "/", map[string]string{"B": "3"}
	if _, out, _ := vm.run(t, own, nil); out != "/ root 13 1048576 0\n" {
		t.Errorf("a command with its own: %q", out)
	}
	code, out, errOut := vm.run(t, agent.Command{Main: true, Env: map[string]string{"B": "4"}}, strings.NewReader("word\n"))
	if code != 7 || out != "word from /srv/made as daemon with 14\n" || errOut != "aside\n" {
		t.Errorf("the process: %d, %q, %q", code, out, errOut)
	}
	if e := vm.await(t, kind(agent.Exited)); e.Code != 7 {
		t.Errorf("code %d, want 7", e.Code)
	}
	vm.ended(t)
}

// It outlives its host, is only one's, and one that does not wait is nobody's.
func TestAttachedAlone(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{
		"args": []string{"sh", "-c", "yes & while [ ! -e /end ]; do sleep 0.1; done; kill $!; exit 5"}, "attach": true,
	})})
	vm.await(t, kind(agent.Ready))
	if _, err := vm.Exec(vm.context(t), agent.Command{Main: true}, nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	if code, out, _ := vm.run(t, sh("until pidof yes; do sleep 0.1; done"), nil); code != 0 {
		t.Fatalf("it does not run: %d, %s", code, out)
	}
	if code, _, _ := vm.run(t, agent.Command{Main: true}, nil); code != 126 {
		t.Errorf("the second who asks gets code %d", code)
	}
	vm.Close()
	vm.connect(t)
	if code, _, _ := vm.run(t, sh("sleep 3; pidof yes && touch /end"), nil); code != 0 { // longer than a command without a host has
		t.Fatal("it has ended with its host")
	}
	if e := vm.await(t, kind(agent.Exited)); e.Code != 5 {
		t.Errorf("code %d, want 5", e.Code)
	}
	vm.ended(t)
}

// The image says by which signal it stops. No other is sent before it has ended.
func TestStopSignal(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{
		"args":        []string{"sh", "-c", "trap 'echo the wrong one' TERM HUP; trap 'sleep 1; echo asked; exit 9' QUIT; touch /up; while :; do sleep 0.1; done"},
		"stop_signal": "SIGQUIT",
	})})
	vm.await(t, kind(agent.Ready))
	if code, _, _ := vm.run(t, sh("until [ -e /up ]; do sleep 0.1; done"), nil); code != 0 {
		t.Fatalf("code %d", code)
	}
	if err := vm.Shutdown(vm.context(t), false); err != nil {
		t.Fatal(err)
	}
	if e := vm.await(t, kind(agent.Exited)); e.Code != 9 {
		t.Errorf("code %d, want 9", e.Code)
	}
	vm.ended(t)
	if c := vm.console(t); !strings.Contains(c, "asked") || strings.Contains(c, "the wrong one") {
		t.Errorf("console %q", c)
	}
}
