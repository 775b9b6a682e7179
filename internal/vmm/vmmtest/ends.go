package vmmtest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
)

// endings are the ways to end, what is told to the guest for it, and the cause
// that must be given.
var endings = map[string]vmm.Cause{
	"poweroff": vmm.PowerOff,
	"reboot":   vmm.Reboot,
	"panic":    vmm.Panic,
	"kill":     vmm.Killed,
}

// ends has guests end in every way, while they are watched.
func (s suite) ends(t *testing.T) {
	machines, dirs := s.boot(t, "poweroff", "reboot", "panic", "kill")
	for name, m := range machines {
		con := open(t, m, dirs[name])
		began := time.Now()
		end(t, con, m.PID(), name)
		exit := awaitEnd(t, m)
		t.Logf("%s: %+v after %v, heard %v after the event", name, exit, time.Since(began).Round(time.Millisecond), time.Since(exit.At).Round(100*time.Microsecond))
		if exit.Cause != endings[name] {
			t.Errorf("%s ended as %+v, want %s", name, exit, endings[name])
		}
		s.expectEnded(t, dirs[name], endings[name])
	}
}

func end(t testing.TB, con *console, pid int, name string) {
	t.Helper()
	if name == "kill" {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		return
	}
	con.tell(t, name)
}

// envStart tells a second process of the test to start microVMs in a directory,
// and to stay.
const envStart = "INGOT_VMMTEST_START"

func (s suite) startAndStay(t *testing.T, dir string) {
	for name := range endings {
		if err := os.Mkdir(dir+"/"+name, 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := s.driver(t).Start(t.Context(), s.config(dir+"/"+name))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("started", name, m.PID())
	}
	fmt.Println("all started")
	select {}
}

// restart has microVMs started by a process that is then killed. They live on;
// those that end before anybody attaches say why all the same.
func (s suite) restart(t *testing.T) {
	dir := stateDir(t, "vmmtest-restart")
	first := exec.Command("/proc/self/exe", "-test.run=^"+strings.SplitN(t.Name(), "/", 2)[0]+"$")
	first.Env = append(os.Environ(), envStart+"="+dir)
	first.Stderr = os.Stderr
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "all started"; {
		t.Log(lines.Text())
	}
	first.Process.Kill()
	first.Wait()

	machines := map[string]vmm.Machine{}
	for name := range endings {
		m, err := s.driver(t).Attach(within(t), dir+"/"+name)
		if err != nil {
			t.Fatal(err)
		}
		machines[name] = m
		t.Cleanup(func() { m.Kill(); m.Close() })
	}
	for name, m := range machines {
		con := open(t, m, dir+"/"+name)
		expectState(t, m, vmm.Running)
		pid := m.PID()
		m.Close() // nobody watches from here on
		end(t, con, pid, name)
		awaitDeath(t, pid)
		s.expectEnded(t, dir+"/"+name, endings[name])
	}
}

// awaitDeath waits until a process that is not our child is gone or a zombie.
func awaitDeath(t testing.TB, pid int) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if !alive(pid) {
			return
		}
	}
	t.Fatalf("process %d does not end", pid)
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}
