package process

import (
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestZombieIsDead(t *testing.T) {
	c := exec.Command("true")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	for deadline := time.Now().Add(5 * time.Second); ; {
		if _, err := Find(c.Process.Pid, 0); errdefs.IsNotFound(err) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("a zombie counts as alive")
		}
	}
}

func TestProcess(t *testing.T) {
	c := exec.Command("sleep", "1000")
	before := time.Now()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Process.Kill()
	p, err := Find(c.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// The kernel tells its own start in whole seconds.
	if at := p.Started(); at.Before(before.Add(-2*time.Second)) || at.After(time.Now().Add(2*time.Second)) {
		t.Errorf("started at %v, now it is %v", at, time.Now())
	}
	if words, err := Cmdline(c.Process.Pid); err != nil || len(words) != 2 || words[1] != "1000" {
		t.Errorf("words %q, %v", words, err)
	}
	if _, err := Find(c.Process.Pid, p.Start+1); !errdefs.IsNotFound(err) {
		t.Errorf("another one of that number: %v", err)
	}
	if n, err := p.Resident(); err != nil || n == 0 {
		t.Errorf("resident: %d, %v", n, err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	status, child, err := p.Wait()
	if err != nil || !child || status.Signal() != unix.SIGTERM {
		t.Errorf("end: %v, %v, %v", status, child, err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Errorf("a signal to one that has ended: %v", err)
	}
}
