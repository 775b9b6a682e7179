package build

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Debian's packages come by apt-get download, which checks their signatures,
// and are read as a stream: nothing is installed or unpacked.

// debPackage is a downloaded package.
type debPackage struct {
	name, version, file string
}

// fetch downloads the newest version of a package that apt knows, unless it is
// in the cache. Where apt cannot be asked, the cache's newest will do.
func fetch(ctx context.Context, o Options, name string) (debPackage, error) {
	dir := filepath.Join(o.cache(), "deb")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return debPackage{}, fmt.Errorf("make the cache: %w", err)
	}
	version, err := candidate(ctx, o, name)
	if err != nil {
		return debPackage{}, err
	}
	p := debPackage{name: name, version: version}
	p.file = filepath.Join(dir, name+"_"+strings.ReplaceAll(version, ":", "%3a")+"_amd64.deb")
	if _, err := os.Stat(p.file); err == nil {
		return p, nil
	}
	o.say("download %s %s", name, version)
	// Into a directory of its own: an interrupted download is never found whole.
	temporary, err := os.MkdirTemp(dir, ".download-*")
	if err != nil {
		return debPackage{}, fmt.Errorf("download %s: %w", name, err)
	}
	defer os.RemoveAll(temporary)
	if _, err := apt(ctx, temporary, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name+"="+version); err != nil {
		return debPackage{}, fmt.Errorf("download %s: %w", name, err)
	}
	files, err := filepath.Glob(filepath.Join(temporary, "*.deb"))
	if err != nil || len(files) != 1 {
		return debPackage{}, fmt.Errorf("download %s: found %d packages", name, len(files))
	}
	if err := os.Rename(files[0], p.file); err != nil {
		return debPackage{}, fmt.Errorf("download %s: %w", name, err)
	}
	return p, nil
}

// candidate is the version that apt would install. Without package lists they
// are fetched first.
func candidate(ctx context.Context, o Options, name string) (string, error) {
	version, err := policy(ctx, o, name)
	if err != nil {
		return "", err
	}
	if version != "" {
		return version, nil
	}
	o.say("fetch apt's package lists (apt-get update)")
	if _, err := apt(ctx, "", "apt-get", "-q", "update"); err != nil {
		return "", fmt.Errorf("find package %s: %w", name, err)
	}
	if version, err = policy(ctx, o, name); err != nil {
		return "", err
	}
	if version == "" {
		return "", fmt.Errorf("find package %s: apt knows none: %w", name, errdefs.ErrNotFound)
	}
	return version, nil
}

func policy(ctx context.Context, o Options, name string) (string, error) {
	out, err := aptCache(ctx, o, "policy", name)
	if err != nil {
		return "", fmt.Errorf("find package %s: %w", name, err)
	}
	for line := range strings.Lines(string(out)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Candidate: "); ok && v != "(none)" {
			return v, nil
		}
	}
	return "", nil
}

// dependency is the first package with a prefix that a package depends on.
func dependency(ctx context.Context, o Options, name, prefix string) (string, error) {
	if _, err := candidate(ctx, o, name); err != nil {
		return "", err
	}
	out, err := aptCache(ctx, o, "depends", name)
	if err != nil {
		return "", fmt.Errorf("read the dependencies of %s: %w", name, err)
	}
	for line := range strings.Lines(string(out)) {
		if d, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(d, prefix) {
			return d, nil
		}
	}
	return "", fmt.Errorf("package %s depends on no %s…: %w", name, prefix, errdefs.ErrNotFound)
}

// aptCache is apt-cache's answer. It takes half a second to give one, and is not
// asked again until apt's lists or sources have changed.
func aptCache(ctx context.Context, o Options, question ...string) ([]byte, error) {
	key := sha256.New()
	fmt.Fprintf(key, "%q", question)
	for _, path := range []string{"/var/lib/apt/lists", "/var/lib/dpkg/status", "/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/preferences", "/etc/apt/preferences.d"} {
		if info, err := os.Stat(path); err == nil {
			fmt.Fprintf(key, " %s %d", path, info.ModTime().UnixNano())
		}
	}
	file := filepath.Join(o.cache(), "apt", strings.Join(question, "-"))
	line := fmt.Sprintf("%x\n", key.Sum(nil))
	if kept, err := os.ReadFile(file); err == nil {
		if answer, ok := strings.CutPrefix(string(kept), line); ok {
			return []byte(answer), nil
		}
	}
	answer, err := apt(ctx, "", append([]string{"apt-cache"}, question...)...)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, fmt.Errorf("make the cache: %w", err)
	}
	return answer, writeFile(file, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s%s", line, answer)
		return err
	})
}

// apt runs a command of apt's, in English, and returns its output.
func apt(ctx context.Context, dir string, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%s is not there; images are built on Debian: %w", argv[0], errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, lastLine(errOut.String()))
	}
	return out.Bytes(), nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// each calls f with every file of the package, its name without "./" at the front.
func (p debPackage) each(ctx context.Context, f func(name string, h *tar.Header, r io.Reader) error) (err error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", p.file)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("read %s: %w", p.file, err)
	}
	r := tar.NewReader(pipe)
	for err == nil {
		var h *tar.Header
		if h, err = r.Next(); err == nil {
			err = f(clean(h.Name), h, r)
		}
	}
	if err != io.EOF {
		pipe.Close() // dpkg-deb ends by SIGPIPE, which is not the news
		cmd.Wait()
		if lastLine(errOut.String()) != "" {
			return fmt.Errorf("read %s: %w: %s", p.file, err, lastLine(errOut.String()))
		}
		return fmt.Errorf("read %s: %w", p.file, err)
	}
	io.Copy(io.Discard, pipe) // tar's padding
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("read %s: %w: %s", p.file, err, lastLine(errOut.String()))
	}
	return nil
}
