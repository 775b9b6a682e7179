package build

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// busyboxFiles are the image's own few.
var busyboxFiles = []struct {
	name string
	mode int64
	text string
}{
	{"etc/group", 0o644, "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n"},
	{"etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"},
	{"etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"},
	{"etc/profile", 0o644, "export PATH=" + busyboxPath + "\n"},
	{"etc/udhcpc/default.script", 0o755, udhcpcScript},
}

const busyboxPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// udhcpcScript is what udhcpc calls with each change of a lease.
const udhcpcScript = `#!/bin/sh
case "$1" in
deconfig)
	ifconfig "$interface" up
	ifconfig "$interface" 0.0.0.0
	;;
bound|renew)
	ifconfig "$interface" "$ip" netmask "$subnet" ${broadcast:+broadcast "$broadcast"}
	for gateway in $router; do
		route del default dev "$interface" 2>/dev/null
		route add default gw "$gateway" dev "$interface"
		break
	done
	: >/etc/resolv.conf
	[ -n "$domain" ] && echo "search $domain" >>/etc/resolv.conf
	for server in $dns; do
		echo "nameserver $server" >>/etc/resolv.conf
	done
	;;
esac
`

// Busybox builds a root image from Debian's static busybox: a link for each of
// its applets but init, so that the guest's own init stays in charge.
func Busybox(ctx context.Context, o Options) (v1.Image, error) {
	return build(ctx, o, "busybox", func() (v1.Image, error) { return busybox(ctx, o) })
}

func busybox(ctx context.Context, o Options) (v1.Image, error) {
	p, err := fetch(ctx, o, "busybox-static")
	if err != nil {
		return nil, err
	}
	program, err := busyboxProgram(ctx, p)
	if err != nil {
		return nil, err
	}
	applets, err := applets(ctx, o, program)
	if err != nil {
		return nil, err
	}
	o.say("assemble busybox image %s, %d applets", p.version, len(applets))
	layer, err := memoryLayer(func(a *archive) { busyboxRoot(a, program, applets) })
	if err != nil {
		return nil, err
	}
	return assemble(v1.Config{
		Cmd:    []string{"sh"},
		Env:    []string{"PATH=" + busyboxPath},
		Labels: map[string]string{labelTitle: "busybox", LabelVersion: p.version},
	}, layer)
}

func busyboxRoot(a *archive, program []byte, applets []string) {
	for _, d := range []string{"bin", "dev", "etc", "etc/udhcpc", "home", "mnt", "proc", "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/lib", "var/log"} {
		a.dir(d, 0o755)
	}
	a.dir("root", 0o700)
	a.dir("tmp", 0o1777)
	a.link("var/run", "/run")
	a.link("var/tmp", "/tmp")
	for _, f := range busyboxFiles {
		a.file(f.name, f.mode, []byte(f.text))
	}
	a.file("bin/busybox", 0o755, program)
	for _, name := range applets {
		a.link(name, "/bin/busybox")
	}
}

func busyboxProgram(ctx context.Context, p debPackage) ([]byte, error) {
	var program []byte
	err := p.each(ctx, func(name string, h *tar.Header, r io.Reader) (err error) {
		if h.Typeflag == tar.TypeReg && path.Base(name) == "busybox" && slices.Contains([]string{"bin", "usr/bin"}, path.Dir(name)) {
			program, err = io.ReadAll(r)
		}
		return err
	})
	if err == nil && program == nil {
		err = fmt.Errorf("package %s has no busybox: %w", p.name, errdefs.ErrNotFound)
	}
	return program, err
}

// applets asks the program for its links: "bin/ls", "usr/sbin/udhcpd".
func applets(ctx context.Context, o Options, program []byte) ([]string, error) {
	dir, err := os.MkdirTemp(o.cache(), ".busybox-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "busybox")
	if err := os.WriteFile(file, program, 0o700); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, file, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets: %w", err)
	}
	var names []string
	for line := range bytes.Lines(out) {
		name := clean(strings.TrimSpace(string(line)))
		if base := path.Base(name); base == "init" || base == "linuxrc" || base == "busybox" {
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
