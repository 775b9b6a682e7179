package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// debianPackages are those of the debian image, beside the essential ones and
// what these depend on.
var debianPackages = []string{
	"ca-certificates", "cloud-init", "dbus", "iproute2", "iputils-ping", "less", "openssh-server",
	"procps", "sudo", "systemd-resolved", "systemd-sysv", "udev",
}

// debianFiles are the image's own.
var debianFiles = map[string]string{
	// Without metadata there is no data source, and cloud-init does not run. With
	// one entry alone it would.
	"etc/cloud/cloud.cfg.d/90_ingot.cfg": `datasource_list: [NoCloud, ConfigDrive]
disable_root: false
ssh_genkeytypes: [ed25519, ecdsa]
apt: {preserve_sources_list: true}
system_info: {network: {renderers: [networkd]}}
locale: false
# Without what is for other distributions, or for disks that have their size already:
# each module is a second where instructions are translated.
cloud_init_modules: [seed_random, bootcmd, write-files, disk_setup, mounts, set_hostname, update_hostname,
  update_etc_hosts, ca-certs, users-groups, ssh]
cloud_config_modules: [ssh-import-id, keyboard, locale, set-passwords, apt-configure, ntp, timezone, runcmd]
cloud_final_modules: [package-update-upgrade-install, write-files-deferred, scripts-vendor, scripts-per-once,
  scripts-per-boot, scripts-per-instance, scripts-user, phone-home, final-message, power-state-change]
`,
	// Each guest has host keys of its own, also without cloud-init. RSA would take
	// seconds where instructions are translated.
	"etc/systemd/system/ssh.service.d/ingot.conf": `[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'test -s /etc/ssh/ssh_host_ed25519_key || ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key'
ExecStartPre=/usr/sbin/sshd -t
`,
	// Who reaches the console has proven to the host who he is.
	"etc/systemd/system/serial-getty@ttyS0.service.d/ingot.conf": `[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear %I 115200,57600,38400,9600 vt220
`,
	"etc/apt/sources.list": "", // written by debianSources
}

// debianScript finishes the root file system, which is $1: what every guest must
// make for itself goes, and what would only be in the way at a first boot.
const debianScript = `set -eu
rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/hostname "$1"/etc/apt/sources.list.d/*
rm -rf "$1"/var/lib/cloud "$1"/var/cache/apt/*.bin "$1"/var/log/*.log "$1"/var/log/apt
: >"$1"/etc/machine-id
chroot "$1" systemctl --quiet enable ssh systemd-networkd systemd-networkd-wait-online systemd-resolved
chroot "$1" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service networking.service
cp -a "$2"/. "$1"/
`

// Debian builds a root image with systemd, sshd and cloud-init, of the release
// and from the archives of this machine, by mmdebstrap.
func Debian(ctx context.Context, o Options) (v1.Image, error) {
	return build(ctx, o, "debian", func() (v1.Image, error) { return debian(ctx, o) })
}

func debian(ctx context.Context, o Options) (v1.Image, error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return nil, fmt.Errorf("mmdebstrap is missing: apt-get install mmdebstrap: %w", errdefs.ErrFailedPrecondition)
	}
	if _, err := candidate(ctx, o, "systemd"); err != nil { // fetches apt's lists if there are none
		return nil, err
	}
	release, lines, lists, err := debianSources(ctx)
	if err != nil {
		return nil, err
	}
	key, made, err := debianKey(lines, lists)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(o.cache(), "debian-"+release+"-"+key+".tar.gz")
	if _, err := os.Stat(file); err != nil {
		if err := o.removeOld(file, "debian-*.tar.gz"); err != nil {
			return nil, err
		}
		o.say("install Debian %s by mmdebstrap: %s", release, strings.Join(debianPackages, " "))
		err := writeFile(file, func(w io.Writer) error { return o.mmdebstrap(ctx, w, release, lines, made) })
		if err != nil {
			return nil, err
		}
	}
	layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	return assemble(v1.Config{
		Cmd:    []string{"bash"},
		Env:    []string{"PATH=" + busyboxPath},
		Labels: map[string]string{labelTitle: "debian", LabelVersion: release + "-" + key},
	}, layer)
}

// removeOld deletes earlier builds: an image is large.
func (o Options) removeOld(but, pattern string) error {
	old, err := filepath.Glob(filepath.Join(o.cache(), pattern))
	for _, f := range old {
		if f != but {
			err = errors.Join(err, os.Remove(f))
		}
	}
	return err
}

// debianSources are Debian's own archives as this machine's apt has them: the
// release's name, sources.list lines, and the files with the lists of packages.
func debianSources(ctx context.Context) (release string, lines, lists []string, err error) {
	out, err := apt(ctx, "", "apt-get", "indextargets", "--format", "$(SITE)|$(RELEASE)|$(COMPONENT)|$(FILENAME)",
		"Created-By: Packages", "Origin: Debian")
	if err != nil {
		return "", nil, nil, err
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 {
			continue
		}
		// Whose signature counts, mmdebstrap finds out: Debian's.
		lines = append(lines, fmt.Sprintf("deb %s %s %s", f[0], f[1], f[2]))
		lists = append(lists, f[3])
		if !strings.ContainsAny(f[1], "-/") {
			release = f[1]
		}
	}
	if release == "" {
		return "", nil, nil, fmt.Errorf("apt knows no archive of Debian: images are built on Debian: %w", errdefs.ErrFailedPrecondition)
	}
	slices.Sort(lines)
	slices.Sort(lists)
	return release, slices.Compact(lines), slices.Compact(lists), nil
}

// debianKey changes with the recipe and with what the archives offer. Nothing in
// them is newer than the time.
func debianKey(lines, lists []string) (key string, made time.Time, err error) {
	sum := sha256.New()
	fmt.Fprint(sum, lines, debianPackages, debianFiles, debianScript)
	for _, name := range lists {
		f, err := openList(name)
		if err != nil {
			return "", made, err
		}
		info, err := f.Stat()
		if err == nil {
			_, err = io.Copy(sum, f)
		}
		f.Close()
		if err != nil {
			return "", made, err
		}
		if info.ModTime().After(made) { // apt gives it the archive's time
			made = info.ModTime()
		}
	}
	return fmt.Sprintf("%x", sum.Sum(nil))[:12], made, nil
}

// openList opens a list of packages, which apt may keep compressed.
func openList(name string) (*os.File, error) {
	f, err := os.Open(name)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	found, globErr := filepath.Glob(name + ".*")
	if globErr != nil || len(found) == 0 {
		return nil, err
	}
	return os.Open(found[0])
}

// mmdebstrap writes the root file system, compressed.
func (o Options) mmdebstrap(ctx context.Context, w io.Writer, release string, lines []string, made time.Time) error {
	dir, err := os.MkdirTemp(o.cache(), ".debian-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	own := filepath.Join(dir, "own")
	files := map[string]string{filepath.Join(dir, "sources.list"): strings.Join(lines, "\n") + "\n", filepath.Join(dir, "finish"): debianScript}
	for name, text := range debianFiles {
		if name == "etc/apt/sources.list" {
			text = publicSources(release)
		}
		files[filepath.Join(own, name)] = text
	}
	for name, text := range files {
		if err := errors.Join(os.MkdirAll(path.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	argv := append([]string{
		"--variant=minbase", "--format=tar", "--quiet", "--include=" + strings.Join(debianPackages, ","),
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--customize-hook=sh " + filepath.Join(dir, "finish") + ` "$1" ` + own,
	}, options...)
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(argv, release, "-", filepath.Join(dir, "sources.list"))...)
	// What is made here has this time. What comes from packages keeps its own, which
	// Python's compiled files go by: with another they would be compiled at each boot.
	cmd.Env = append(os.Environ(), "LC_ALL=C", fmt.Sprintf("SOURCE_DATE_EPOCH=%d", made.Unix()))
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = z, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w: %s", err, lastLines(said.String(), 5))
	}
	return z.Close()
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// aptOptions are what this machine's apt needs to reach the archives.
func aptOptions(ctx context.Context) ([]string, error) {
	out, err := apt(ctx, "", "apt-config", "dump", "Acquire")
	if err != nil {
		return nil, err
	}
	var options []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		for _, prefix := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"} {
			if strings.HasPrefix(line, prefix) && !strings.HasSuffix(line, ` "";`) {
				options = append(options, "--aptopt="+line)
			}
		}
	}
	return options, nil
}

// publicSources are Debian's own for a guest: this machine's may be a mirror
// that no guest reaches.
func publicSources(release string) string {
	const archive, security = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
	return fmt.Sprintf("deb %s %s main\ndeb %s %s-updates main\ndeb %s %s-security main\n", archive, release, archive, release, security, release)
}
