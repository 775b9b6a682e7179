package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// directories are a machine's own: they hide this machine's at the same path,
// and outlive a reboot.
var directories = []string{
	"/var/lib/flintlock", "/var/lib/containerd", "/var/lib/dhcp", "/var/lib/ingot",
	"/etc/dhcp", "/etc/ingot", "/etc/opt/flintlockd",
}

// holding is what a new machine's first process is told.
type holding struct {
	Hostname string            `json:"hostname"`
	Files    string            `json:"files"` // the machine's persistent files
	Scratch  string            `json:"scratch"`
	RunDir   string            `json:"run_dir"`
	Texts    map[string]string `json:"texts"` // small files that are made anew with the machine
}

// makeNamespace makes and pins a machine's namespaces.
func (l *Lab) makeNamespace(m Machine) error {
	// What a killed Ensure has left.
	if err := link.UnpinNamespace(l.pin(m.Name)); err != nil {
		return err
	}
	scratch := filepath.Join(l.scratch(), m.Name)
	if err := os.RemoveAll(scratch); err != nil {
		return err
	}
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(l.files(m.Name), 0o755); err != nil {
		return err
	}
	told, err := json.Marshal(holding{
		Hostname: m.Name, Files: l.files(m.Name), Scratch: scratch, RunDir: l.RunDir, Texts: l.texts(m),
	})
	if err != nil {
		return err
	}
	// The kernel lets a mount namespace be pinned only in one that is older, and
	// goes by numbers for that which newer kernels give out in batches, one a CPU:
	// seen to fail at random from inside a container (Linux 6.18). Another try gets
	// another number.
	for tries := 1; ; tries++ {
		err := l.hold(m, told)
		if !errors.Is(err, unix.EINVAL) || tries == mostTries {
			return err
		}
		if err := link.UnpinNamespace(l.pin(m.Name)); err != nil {
			return err
		}
	}
}

const mostTries = 10

// hold makes namespaces by way of a process that prepares them, and pins them.
func (l *Lab) hold(m Machine, told []byte) error {
	c := exec.Command(l.Binary, "lab", "hold")
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS,
		Setsid:     true,
	}
	in, err := c.StdinPipe()
	if err != nil {
		return err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return fmt.Errorf("make machine %s: %w", m.Name, err)
	}
	defer func() { in.Close(); c.Wait() }()
	if _, err := in.Write(append(bytes.Clone(told), '\n')); err != nil {
		return fmt.Errorf("make machine %s: %w", m.Name, err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ok\n" {
		return fmt.Errorf("make machine %s: its first process has failed, see above: %w", m.Name, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return link.PinNamespace(c.Process.Pid, l.pin(m.Name))
}

// texts are the files that say who a machine is.
func (l *Lab) texts(m Machine) map[string]string {
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	resolver := m.Address
	for _, other := range l.Machines {
		hosts += fmt.Sprintf("%s %s\n", other.Address, other.Name)
		if other.Hub {
			resolver = other.Address
		}
	}
	return map[string]string{
		"/etc/hostname":    m.Name + "\n",
		"/etc/hosts":       hosts,
		"/etc/resolv.conf": fmt.Sprintf("nameserver %s\n", resolver),
	}
}

// Hold is a new machine's first process: it lays the machine's files out, says
// so, and waits until its namespaces are pinned.
func Hold(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	r := bufio.NewReader(in)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read what to hold: %w", err)
	}
	var h holding
	if err := json.Unmarshal(line, &h); err != nil {
		return fmt.Errorf("read what to hold: %w", err)
	}
	if err := h.lay(); err != nil {
		return fmt.Errorf("lay out %s: %w", h.Hostname, err)
	}
	if _, err := io.WriteString(out, "ok\n"); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

func (h holding) lay() error {
	if err := unix.Sethostname([]byte(h.Hostname)); err != nil {
		return err
	}
	// Slave, not private: what this machine unmounts is gone in the lab as well.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err
	}
	// The machine's files lie below /var/lib, which is about to be covered.
	files, err := unix.Open(h.Files, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", h.Files, err)
	}
	defer unix.Close(files)
	for _, covered := range []string{"/etc", "/var/lib"} {
		upper := filepath.Join(h.Scratch, "upper", covered)
		work := filepath.Join(h.Scratch, "work", covered)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", covered, upper, work)
		if err := mount("overlay", covered, "overlay", 0, options); err != nil {
			return err
		}
	}
	// Otherwise this machine would hold on to the other machines' namespaces. Those of
	// other labs let go of it: to unlink a pin takes its copies away as well.
	if err := unix.Unmount(h.RunDir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach %s: %w", h.RunDir, err)
	}
	if err := mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	if err := freshSysfs(); err != nil {
		return err
	}
	for _, dir := range directories {
		own := fmt.Sprintf("/proc/self/fd/%d%s", files, dir)
		if err := errors.Join(os.MkdirAll(own, 0o755), os.MkdirAll(dir, 0o755)); err != nil {
			return err
		}
		if err := mount(own, dir, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return writeTexts(h.Texts)
}

func writeTexts(texts map[string]string) error {
	for path, text := range texts {
		// It may be a link to a file of this machine's.
		if err := removeFile(path); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Write is what runs inside a machine whose texts have changed.
func Write(in io.Reader) error {
	var texts map[string]string
	if err := json.NewDecoder(in).Decode(&texts); err != nil {
		return fmt.Errorf("read what to write: %w", err)
	}
	return writeTexts(texts)
}

// freshSysfs shows this network namespace's interfaces in /sys, and keeps the
// cgroups that are mounted below it.
func freshSysfs() error {
	const aside = "/run/cgroup-aside"
	_, err := os.Stat("/sys/fs/cgroup")
	keep := err == nil
	if keep {
		if err := os.Mkdir(aside, 0o755); err != nil {
			return err
		}
		if err := mount("/sys/fs/cgroup", aside, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	if err := mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if !keep {
		return nil
	}
	if err := mount(aside, "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Unmount(aside, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", aside, err)
	}
	return os.Remove(aside)
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

func lockAndEnter(ns *link.Namespace) error {
	runtime.LockOSThread()
	return ns.Enter()
}
