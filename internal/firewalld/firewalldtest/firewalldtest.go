// Package firewalldtest runs a real firewalld for a test, on a system bus of its own:
// in the network and mount namespaces that the test is in, where /run must be nobody
// else's. Its configuration is a copy; nothing of it outlives the test.
package firewalldtest

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"ingot/internal/need"
	"ingot/internal/tests"
)

// Daemon is a firewalld that may run.
type Daemon struct {
	t       testing.TB
	root    string // below which its package is unpacked
	dir     string
	process *process
}

// New starts a system bus, and no firewalld yet.
func New(t testing.TB) *Daemon {
	t.Helper()
	for _, name := range []string{"firewalld", "dbus-daemon", "iptables", "nft"} {
		need.Binary(t, name)
	}
	path, err := exec.LookPath("firewalld")
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{t: t, root: filepath.Clean(path + "/../../.."), dir: t.TempDir()}
	if err := os.CopyFS(d.dir+"/etc", os.DirFS(d.root+"/etc/firewalld")); err != nil {
		t.Fatal(err)
	}
	// As Debian has it for the system bus, with firewalld's own policy.
	config := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
	<type>system</type>
	<listen>unix:path=/run/dbus/system_bus_socket</listen>
	<auth>EXTERNAL</auth>
	<policy context="default">
		<allow user="*"/>
		<deny own="*"/>
		<deny send_type="method_call"/>
		<allow send_type="signal"/>
		<allow send_requested_reply="true" send_type="method_return"/>
		<allow send_requested_reply="true" send_type="error"/>
		<allow receive_type="method_call"/>
		<allow receive_type="method_return"/>
		<allow receive_type="error"/>
		<allow receive_type="signal"/>
		<allow send_destination="org.freedesktop.DBus"/>
	</policy>
	<include>` + d.root + `/usr/share/dbus-1/system.d/FirewallD.conf</include>
</busconfig>
`
	if err := os.WriteFile(d.dir+"/bus.conf", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/dbus", 0o755); err != nil {
		t.Fatal(err)
	}
	bus := d.start("bus", "dbus-daemon", "--config-file="+d.dir+"/bus.conf", "--nofork", "--nopidfile")
	t.Cleanup(func() {
		d.Stop()
		bus.end()
		os.RemoveAll("/run/dbus")
	})
	tests.Await(d.t, 30*time.Second, "the system bus", func() bool {
		_, err := os.Stat("/run/dbus/system_bus_socket")
		return err == nil
	})
	return d
}

// Set sets one line of firewalld.conf: FirewallBackend=iptables.
func (d *Daemon) Set(line string) {
	d.t.Helper()
	path := d.dir + "/etc/firewalld.conf"
	key, _, _ := strings.Cut(line, "=")
	b, err := os.ReadFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for i := range lines {
		if strings.HasPrefix(lines[i], key+"=") {
			lines[i] = line
		}
	}
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o644); err != nil {
		d.t.Fatal(err)
	}
}

// Start starts firewalld, and waits until it has its rules.
func (d *Daemon) Start() {
	d.t.Helper()
	d.process = d.start("firewalld", d.root+"/usr/sbin/firewalld", "--nofork", "--nopid",
		"--system-config", d.dir+"/etc", "--default-config", d.root+"/usr/lib/firewalld", "--log-file", d.dir+"/firewalld.own.log")
	tests.Await(d.t, 30*time.Second, "firewalld (see its log below)", func() bool { return d.command("--state").Run() == nil })
}

// Stop ends firewalld, which takes its rules away.
func (d *Daemon) Stop() {
	if d.process != nil {
		d.process.end()
	}
	d.process = nil
}

// Cmd is what firewall-cmd says.
func (d *Daemon) Cmd(args ...string) string {
	d.t.Helper()
	out, err := d.command(args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("firewall-cmd %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Files are the permanent configuration, by path.
func (d *Daemon) Files() map[string]string {
	d.t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(d.dir+"/etc", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			files[path] = "directory"
			return err
		}
		b, err := os.ReadFile(path)
		files[path] = string(b)
		return err
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return files
}

func (d *Daemon) command(args ...string) *exec.Cmd {
	return exec.Command(d.root+"/usr/bin/firewall-cmd", args...)
}

// process is one that runs until the test says so, or is killed.
type process struct {
	cmd  *exec.Cmd
	gone chan struct{}
}

func (d *Daemon) start(name string, argv ...string) *process {
	d.t.Helper()
	var said bytes.Buffer
	p := &process{exec.Command(argv[0], argv[1:]...), make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &said, &said
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(p.gone)
		runtime.LockOSThread() // its death is what Pdeathsig is about
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		if d.t.Failed() && said.Len() > 0 { // it has ended: clean-ups run backwards
			own, _ := os.ReadFile(d.dir + "/firewalld.own.log")
			d.t.Logf("%s: %s%s", name, said.String(), own)
		}
	})
	return p
}

// end asks a process to end, and insists.
func (p *process) end() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.gone:
	case <-time.After(10 * time.Second):
		p.cmd.Process.Kill()
		<-p.gone
	}
}
