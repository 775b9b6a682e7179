package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// imageInit is the init of an image.
type imageInit struct {
	path    string // inside the root
	systemd bool
}

// findInit looks for an init in the image under root.
func findInit(root string) (imageInit, bool) {
	for _, path := range []string{"/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"} {
		real, err := resolveIn(root, path)
		if err != nil {
			continue
		}
		info, err := os.Stat(root + real)
		if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
			continue
		}
		i := imageInit{path: path, systemd: filepath.Base(real) == "systemd"}
		if filepath.Base(real) == "busybox" && !hasInittab(root) {
			continue
		}
		return i, true
	}
	return imageInit{}, false
}

// hasInittab says whether busybox's init has something to do: images for
// containers carry its link, and an inittab that names what is not there.
func hasInittab(root string) bool {
	b, err := os.ReadFile(root + "/etc/inittab")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 4)
		if len(f) < 4 || f[2] != "sysinit" {
			continue
		}
		program, _, _ := strings.Cut(f[3], " ")
		if _, err := resolveIn(root, program); err != nil {
			return false
		}
	}
	return true
}

// resolveIn follows path's links as they are for a process whose root is root.
func resolveIn(root, path string) (string, error) {
	done, rest := "/", strings.TrimPrefix(filepath.Clean("/"+path), "/")
	for links := 0; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if part == ".." {
			done = filepath.Dir(done)
			continue
		}
		next := filepath.Join(done, part)
		info, err := os.Lstat(root + next)
		if err != nil {
			return "", err
		}
		if info.Mode()&os.ModeSymlink == 0 {
			done = next
			continue
		}
		if links++; links > 40 {
			return "", syscall.ELOOP
		}
		target, err := os.Readlink(root + next)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(target) {
			done = "/"
		}
		rest = strings.TrimPrefix(strings.TrimSuffix(target, "/")+"/"+rest, "/")
		rest = strings.TrimSuffix(rest, "/")
	}
	return done, nil
}

// agentPath is where the agent's program is for an image's own init: on /run,
// so that the image stays as it was.
const agentPath = "/run/ingot/init"

// handOver makes the image's init PID 1, with the agent beside it.
func handOver(o options, net *network, i imageInit) error {
	net.close()
	if err := mountRun(newRoot); err != nil {
		return err
	}
	if err := copyProgram(newRoot + agentPath); err != nil {
		return fmt.Errorf("place the agent: %w", err)
	}
	if err := keepProcess(newRoot + handedProcess); err != nil {
		return fmt.Errorf("place the process: %w", err)
	}
	writeNames(newRoot, o.hostname)
	withNetwork := true
	if i.systemd {
		withNetwork = !keepsNetwork(newRoot, o.seeded)
		if err := writeUnits(newRoot+"/run", o, withNetwork); err != nil {
			return err
		}
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if !i.systemd {
		if err := forkAgent(); err != nil {
			return fmt.Errorf("start the agent: %w", err)
		}
	}
	err := syscall.Exec(i.path, []string{i.path}, []string{"HOME=/", "TERM=linux"})
	return fmt.Errorf("run %s: %w", i.path, err)
}

func copyProgram(to string) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	from, err := os.Open("/init")
	if err != nil {
		return err
	}
	defer from.Close()
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Remove("/init") // the initramfs is the guest's memory
}

// keepProcess takes the initramfs's process along, if it has one.
func keepProcess(to string) error {
	b, err := os.ReadFile(processFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600) // its environment may hold secrets
}

// forkAgent starts the agent as a child that survives the exec of init.
func forkAgent() error {
	_, err := syscall.ForkExec(agentPath, []string{"ingot-agent", "agent", "network"}, &syscall.ProcAttr{
		Dir:   "/",
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	return err
}

// keepsNetwork says whether a systemd image brings its network up and keeps
// resolv.conf: with networkd, which waits for ever for links that udev has not
// seen, and resolved, or cloud-init if that has something to do, whose own business
// it then is. For any other the agent does it.
func keepsNetwork(root string, seeded bool) bool {
	program := func(name string) bool {
		for _, dir := range []string{"/lib/systemd/", "/usr/lib/systemd/", "/usr/bin/"} {
			if _, err := os.Stat(root + dir + name); err == nil {
				return true
			}
		}
		return false
	}
	return program("systemd-networkd") && program("systemd-udevd") && (program("systemd-resolved") || program("cloud-init") && seeded)
}

// writeUnits writes, below a systemd root's /run, the agent's unit, and the
// network's configuration for systemd-networkd where the agent does not do it. Names
// sort after those of cloud-init and of the image, which therefore win.
func writeUnits(run string, o options, withNetwork bool) error {
	arguments := ""
	if withNetwork {
		arguments = " network"
	}
	files := map[string]string{"systemd/system/ingot-agent.service": `[Unit]
Description=Ingot guest agent
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=` + agentPath + ` agent` + arguments + `
Restart=always
RestartSec=1
`}
	links := map[string]string{"systemd/system/sysinit.target.wants/ingot-agent.service": "../ingot-agent.service"}
	if !withNetwork {
		for name, text := range networkdFiles(o) {
			files["systemd/network/"+name] = text
		}
		links["systemd/system/multi-user.target.wants/systemd-networkd.service"] = "/lib/systemd/system/systemd-networkd.service"
	}
	for name, text := range files {
		path := filepath.Join(run, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for name, target := range links {
		path := filepath.Join(run, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, path); err != nil {
			return err
		}
	}
	return nil
}

// networkdFiles are systemd-networkd's, one an interface.
func networkdFiles(o options) map[string]string {
	wanted := defaultNICs(o.nic)
	if o.network != "" {
		wanted = parseNetwork(o.network)
	}
	files := map[string]string{}
	for _, w := range wanted {
		var b strings.Builder
		b.WriteString("[Match]\n")
		if w.mac != "" {
			fmt.Fprintf(&b, "MACAddress=%s\n", w.mac)
		} else {
			fmt.Fprintf(&b, "Name=%s\n", w.name)
		}
		b.WriteString("\n[Network]\n")
		for _, a := range w.addresses {
			fmt.Fprintf(&b, "Address=%s\n", a)
		}
		for _, g := range w.gateways {
			fmt.Fprintf(&b, "Gateway=%s\n", g)
		}
		for _, n := range w.nameservers {
			fmt.Fprintf(&b, "DNS=%s\n", n)
		}
		if w.dhcp {
			b.WriteString("DHCP=ipv4\n\n[DHCPv4]\nClientIdentifier=mac\n")
		} else {
			b.WriteString("LinkLocalAddressing=no\n")
		}
		files["90-ingot-"+w.name+".network"] = b.String()
	}
	return files
}
