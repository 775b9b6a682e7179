package guest_test

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ingot/internal/agent"
)

// process is the command line's word for a process.
func process(t *testing.T, p map[string]any) string {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return "ingot.process=" + base64.RawURLEncoding.EncodeToString(b)
}

func (vm *guestVM) console(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(vm.dir + "/console")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The process's end is the guest's, and the host learns its code first.
func TestProcessExit(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{
		"args": []string{"sh", "-c", "echo $GREETING from $(pwd) as $(id -un) on $(tty); (sleep 100 &); exit 7"},
		"env":  map[string]string{"GREETING": "hello"}, "dir": "/tmp", "user": "daemon",
	})})
	e := vm.await(t, kind(agent.Exited))
	if e.Code != 7 {
		t.Errorf("code %d, want 7", e.Code)
	}
	vm.ended(t)
	if c := vm.console(t); !strings.Contains(c, "hello from /tmp as daemon on /dev/ttyS0") || !strings.Contains(c, "process ended with code 7") {
		t.Errorf("console %q", c)
	}
}

func TestProcessMissing(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{"args": []string{"/no/such"}}), "ingot.poweroff=reboot"})
	if e := vm.await(t, kind(agent.Exited)); e.Code != 127 {
		t.Errorf("code %d, want 127", e.Code)
	}
	vm.ended(t) // by a restart, which -no-reboot makes an end
}

// A shell on the console is a shell with job control, for whoever attaches.
func TestConsoleShell(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{process(t, map[string]any{"args": []string{"sh"}})})
	vm.await(t, kind(agent.Ready))
	con := dial(t, vm.dir+"/con.sock")
	defer con.Close()
	con.SetDeadline(time.Now().Add(20 * time.Second))
	// ^C is a signal only once the shell has given the terminal to the command.
	fmt.Fprint(con, "sh -c 'echo up$((1+1)); exec sleep 100'\n")
	expectLine(t, con, "up2")
	fmt.Fprint(con, "\x03")
	fmt.Fprint(con, "echo $((40+2)); exit 6\n")
	expectLine(t, con, "42")
	if e := vm.await(t, kind(agent.Exited)); e.Code != 6 {
		t.Errorf("code %d, want 6", e.Code)
	}
	vm.ended(t)
	if strings.Contains(vm.console(t), "job control turned off") {
		t.Error("the console controls no session")
	}
}

func expectLine(t *testing.T, c net.Conn, want string) {
	t.Helper()
	r := bufio.NewReader(c)
	var text string
	for !strings.Contains(text, want) {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("%v after %q, want %q", err, text, want)
		}
		text += string(b)
	}
}

// Without a host, the guest ends all the same, and what it wrote is on the disk.
func TestPowerButton(t *testing.T) {
	t.Parallel()
	vm := start(t, nil)
	vm.await(t, kind(agent.Ready))
	if code, _, _ := vm.run(t, sh("echo kept > /kept; while [ ! -e /dev/input/event0 ]; do sleep 0.1; done"), nil); code != 0 {
		t.Fatalf("code %d", code)
	}
	vm.Close()
	qmp := dial(t, vm.dir+"/qmp.sock")
	defer qmp.Close()
	r := bufio.NewReader(qmp)
	deadline := time.Now().Add(20 * time.Second)
	fmt.Fprint(qmp, `{"execute":"qmp_capabilities"}`)
	for pressed := time.Duration(0); ; pressed += 500 * time.Millisecond {
		fmt.Fprint(qmp, `{"execute":"system_powerdown"}`)
		if _, err := r.ReadString('\n'); err != nil {
			break
		}
		select {
		case <-vm.done:
		case <-time.After(500 * time.Millisecond):
			if time.Now().Before(deadline) {
				continue
			}
			t.Fatal("the power button does nothing")
		}
		break
	}
	vm.ended(t)
	out, err := exec.Command("debugfs", "-R", "cat /kept", vm.dir+"/root.img").Output()
	if err != nil || string(out) != "kept\n" {
		t.Errorf("on the disk: %q, %v", out, err)
	}
}

// A guest that cannot start says why, and panics, which a hypervisor sees.
func TestNoRoot(t *testing.T) {
	t.Parallel()
	vm := start(t, []string{"root=/dev/vdz"})
	vm.ended(t)
	if c := vm.console(t); !strings.Contains(c, "no device /dev/vdz") || !strings.Contains(c, "Kernel panic") {
		t.Errorf("console %q", c)
	}
}

// An image with an init of its own gets it, with the agent beside it.
func TestImageInit(t *testing.T) {
	t.Parallel()
	p := mustParts(t)
	root := filepath.Join(t.TempDir(), "root.img")
	command(t, "cp", p.root, root)
	inittab := filepath.Join(t.TempDir(), "inittab")
	if err := os.WriteFile(inittab, []byte("::sysinit:/bin/echo sysinit was here\n::ctrlaltdel:/sbin/reboot\n::shutdown:/bin/echo goodbye\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"symlink /sbin/init /bin/busybox", "write " + inittab + " /etc/inittab"} {
		command(t, "debugfs", "-w", "-R", c, root)
	}
	vm := startIn(t, "", root, []string{"ingot.hostname=own"})
	vm.await(t, kind(agent.Ready))
	_, out, _ := vm.run(t, sh("cat /proc/1/comm; cat /etc/hostname; ls /run/ingot"), nil)
	if out != "init\nown\ninit\n" {
		t.Errorf("in the guest: %q", out)
	}
	if _, out, _ := vm.run(t, sh("readlink /proc/1/exe"), nil); !strings.Contains(out, "busybox") {
		t.Errorf("PID 1 is %q", out)
	}
	vm.grow(t, "d0", 256)
	vm.awaitSize(t, "/", 256)
	if err := vm.Shutdown(vm.context(t), false); err != nil {
		t.Fatal(err)
	}
	vm.ended(t)
	if c := vm.console(t); !strings.Contains(c, "sysinit was here") || !strings.Contains(c, "goodbye") {
		t.Errorf("console %q", c)
	}
}
