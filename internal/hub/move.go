package hub

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/dhcp"
	"ingot/internal/vpn"
)

const (
	// manifestName is the first file of an archive: what it is.
	manifestName = "ingot-hub.json"
	// endName is the last one, and empty: tar itself does not notice that files are
	// missing at its end.
	endName = "end"
)

// Names in an archive of the lease log, and of the registry's images.
const (
	leasesName = "leases"
	imagesName = "registry"
)

// stagedDir is where an archive's files are until they are put in place.
const stagedDir = "/var/lib/ingot/import.new"

type manifest struct {
	Format   int       `json:"format"`
	Version  string    `json:"version"`
	Exported time.Time `json:"exported"`
}

// kept is what a hub has beside its configuration: files and directories, by their
// names in an archive. What else a hub learns to keep is added here.
func (c Config) kept(images bool) map[string]string {
	all := map[string]string{leasesName: leasesFile, "dhcp": filepath.Dir(importedFile), "vpn": vpnDir, "guests": guestsFile, "access": accessFile}
	if c.Tailscale != nil {
		all["tailscale"] = tailscaleDir // a hub that is to be in no tailnet would log the other out
	}
	if images {
		all[imagesName] = c.Registry
	}
	return all
}

// declared is what says how a hub is, and who it is: that of a machine which has it
// already stays.
func (c Config) declared() map[string]string {
	return map[string]string{"hub.yaml": c.file, "pki": c.PKI, "token": c.TokenFile, "tailscale-key": TailscaleKey}
}

// Export writes an archive (tar) of all that makes a hub: its configuration, with its
// keys, its leases and reservations, and the VPN's; images if they are wanted. A hub
// that runs may go on: what it has acknowledged until now is in the archive.
func Export(w io.Writer, c Config, images bool) error {
	t := tar.NewWriter(w)
	about, err := json.Marshal(manifest{Format: 1, Version: c.version, Exported: time.Now().UTC()})
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Name: manifestName, Mode: 0o600, Size: int64(len(about))}); err != nil {
		return err
	}
	if _, err := t.Write(about); err != nil {
		return err
	}
	for _, set := range []map[string]string{c.declared(), c.kept(images)} {
		for _, name := range sorted(set) {
			if err := pack(t, name, set[name]); err != nil {
				return fmt.Errorf("export %s: %w", set[name], err)
			}
		}
	}
	if err := t.WriteHeader(&tar.Header{Name: endName, Mode: 0o600}); err != nil {
		return err
	}
	return t.Close()
}

func sorted(m map[string]string) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// pack adds a file, or all files of a directory; none is fine. Either may be a link, and so
// may files within, as certificates are. What else a link leads to is an error: nobody
// would notice that it is missing.
func pack(t *tar.Writer, name, from string) error {
	if _, err := os.Lstat(from); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(file string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // gone meanwhile
		}
		link := err == nil && d.Type() == fs.ModeSymlink
		if err != nil || !link && !d.Type().IsRegular() {
			return err
		}
		below, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		f, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) && !link {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is a link, and to no file: %w", file, errdefs.ErrFailedPrecondition)
		}
		h := &tar.Header{Name: path.Join(name, filepath.ToSlash(below)), Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: info.ModTime()}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err = io.CopyN(t, f, info.Size()) // a log grows meanwhile
		return err
	})
}

// Import makes this machine's hub what an archive says. No hub may run here, nor have
// given addresses or let VPN peers in, unless all of that is to be replaced. What the
// archive lacks is gone then, but for images. What declares the hub stays
// where it is there already, and is told; else the archive says where it is to be, as long
// as that is a place of Ingot's. Import is repeated where it was interrupted.
func Import(ctx context.Context, r io.Reader, file, version string, replaced bool) (stays []string, err error) {
	lock, err := dhcp.Lock(ctx, leasesFile)
	if err != nil {
		return nil, fmt.Errorf("a hub runs here, stop it first: %w", err)
	}
	defer lock.Close()
	if err := os.RemoveAll(stagedDir); err != nil {
		return nil, err
	}
	defer os.RemoveAll(stagedDir)
	if err := unpack(r, stagedDir); err != nil {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	c, err := ReadConfig(stagedDir+"/hub.yaml", version)
	if err != nil {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	if _, err := dhcp.ReadLeases(filepath.Join(stagedDir, leasesName)); err != nil {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	if !replaced {
		if err := checkLoss(); err != nil {
			return nil, err
		}
	}
	switch here, err := ReadConfig(file, version); {
	case err == nil:
		c = here
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	default:
		if err := c.checkPlaces(); err != nil {
			return nil, fmt.Errorf("read archive: hub.yaml: %w", err)
		}
	}
	c.file = file
	declared := c.declared()
	for _, name := range sorted(declared) {
		from, to := filepath.Join(stagedDir, name), declared[name]
		if _, err := os.Stat(to); err == nil {
			stays = append(stays, to)
			continue
		}
		if _, err := os.Stat(from); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := put(from, to); err != nil {
			return stays, err
		}
	}
	kept := c.kept(true)
	// The leases come last: once they are there, nothing is missing.
	names := append(slices.DeleteFunc(sorted(kept), func(name string) bool { return name == leasesName }), leasesName)
	for _, name := range names {
		from := filepath.Join(stagedDir, name)
		if _, err := os.Stat(from); errors.Is(err, os.ErrNotExist) {
			if name == imagesName {
				continue // they were not asked for
			}
			if err := remove(kept[name]); err != nil {
				return stays, err
			}
		} else if err := put(from, kept[name]); err != nil {
			return stays, err
		}
	}
	return stays, nil
}

// checkPlaces says whether an archive may choose the places that its configuration has:
// what is there is replaced, and must be nothing but Ingot's, and one thing each.
func (c Config) checkPlaces() error {
	taken := map[string]string{"hub.yaml": "/etc/ingot/hub.yaml", "tailscale-key": TailscaleKey, "tailscale": tailscaleDir, "what import unpacks": stagedDir}
	maps.Copy(taken, c.kept(false))
	for _, place := range []struct{ key, path string }{{"pki", c.PKI}, {"token-file", c.TokenFile}, {"registry", c.Registry}} {
		if path.Clean(place.path) != place.path || !within("/etc/ingot", place.path) && !within("/var/lib/ingot", place.path) {
			return fmt.Errorf("%s: %q is not below /etc/ingot or /var/lib/ingot: write the configuration here first, if it is to be there: %w", place.key, place.path, errdefs.ErrInvalidArgument)
		}
		for _, other := range sorted(taken) {
			if at := taken[other]; at == place.path || within(at, place.path) || within(place.path, at) {
				return fmt.Errorf("%s: %s is not apart from %s, where %s is: %w", place.key, place.path, at, other, errdefs.ErrInvalidArgument)
			}
		}
		taken[place.key] = place.path
	}
	return nil
}

// within says whether a path is below a directory, both as path.Clean has them.
func within(dir, file string) bool { return strings.HasPrefix(file, dir+"/") }

// checkLoss says what this machine's hub has that would be lost with the archive that is
// unpacked. What an import that was interrupted has put here is not.
func checkLoss() error {
	var lost []string
	count := func(n int, what string) {
		if n > 0 {
			lost = append(lost, fmt.Sprintf("%d %s", n, what))
		}
	}
	if !same(filepath.Join(stagedDir, leasesName), leasesFile) {
		leases, err := dhcp.ReadLeases(leasesFile)
		if err != nil {
			return err
		}
		count(len(slices.DeleteFunc(leases, func(l dhcp.Lease) bool { return l.State != dhcp.Active })), "leases")
		reservations, err := dhcp.ReadReservations(leasesFile)
		if err != nil {
			return err
		}
		count(len(reservations), "reservations")
	}
	// Peers know the hub by its key.
	if staged := filepath.Join(stagedDir, "vpn"); !same(filepath.Join(staged, vpn.KeyFile), filepath.Join(vpnDir, vpn.KeyFile)) ||
		!same(filepath.Join(staged, vpn.PeersFile), filepath.Join(vpnDir, vpn.PeersFile)) {
		peers, err := vpn.ReadPeers(vpnDir)
		if err != nil {
			return err
		}
		count(len(peers), "VPN peers")
	}
	if len(lost) > 0 {
		return fmt.Errorf("the hub of this machine has %s that would be lost: %w", strings.Join(lost, ", "), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// same says whether two files have the same in them.
func same(x, y string) bool {
	a, err := os.ReadFile(x)
	b, err2 := os.ReadFile(y)
	return err == nil && err2 == nil && bytes.Equal(a, b)
}

// remove has nothing be at a place, on the disk when it returns.
func remove(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// put has a file or a directory be at its place.
func put(from, to string) error {
	if err := makeDir(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	// Beside it first, since it may be another file system.
	beside := to + ".import"
	if err := os.RemoveAll(beside); err != nil {
		return err
	}
	if err := copyAll(from, beside); err != nil {
		return fmt.Errorf("import %s: %w", to, err)
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.Rename(beside, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

// copyAll copies a file or a directory with all in it, on the disk when it returns.
func copyAll(from, to string) error {
	var made []string
	err := filepath.WalkDir(from, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		if d.IsDir() {
			made = append(made, filepath.Join(to, below))
			return os.Mkdir(filepath.Join(to, below), 0o700)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		in, err := os.Open(file)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.OpenFile(filepath.Join(to, below), os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		return errors.Join(err, out.Sync(), out.Close())
	})
	if err != nil {
		return err
	}
	for _, dir := range made {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// unpack writes an archive's files below a directory. It takes no links, and nothing
// but what Export puts there.
func unpack(r io.Reader, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	known := Config{Tailscale: &Tailscale{}}.kept(true)
	for name := range (Config{}).declared() {
		known[name] = ""
	}
	t := tar.NewReader(r)
	for first := true; ; first = false {
		h, err := t.Next()
		if err == nil && h.Name == endName && !first {
			return nil
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("it is no archive of a hub, or not all of one: %w", err)
		}
		if first {
			if err := checkManifest(h, t); err != nil {
				return err
			}
			continue
		}
		top, _, _ := strings.Cut(h.Name, "/")
		if _, ok := known[top]; !ok || h.Typeflag != tar.TypeReg || !filepath.IsLocal(h.Name) {
			return fmt.Errorf("%q is not of a hub: %w", h.Name, errdefs.ErrInvalidArgument)
		}
		if err := extract(root, h, t); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func checkManifest(h *tar.Header, r io.Reader) error {
	var m manifest
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, 1<<16); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := json.Unmarshal(b.Bytes(), &m); h.Name != manifestName || err != nil {
		return fmt.Errorf("it is no archive of a hub: %w", errdefs.ErrInvalidArgument)
	}
	if m.Format != 1 {
		return fmt.Errorf("format %d is not known to this version: %w", m.Format, errdefs.ErrInvalidArgument)
	}
	return nil
}

func extract(root *os.Root, h *tar.Header, r io.Reader) error {
	for i, c := range h.Name {
		if c == '/' {
			if err := root.Mkdir(h.Name[:i], 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
	}
	f, err := root.OpenFile(h.Name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, fs.FileMode(h.Mode)&0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Sync(), f.Close())
}
