package build

import (
	"archive/tar"
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Archive is what others have saved: the form of docker save, or the OCI image
// layout, as a directory or in a tar archive, which may be compressed.
type Archive struct {
	dir  string // of our own, with what was unpacked; empty: nothing was
	path string
	kind archiveKind
}

type archiveKind string

const (
	dockerSave archiveKind = "docker save"
	ociLayout  archiveKind = "OCI image layout"
	rootFS     archiveKind = "root file system"
)

// Named is an image and what its archive calls it; the name is empty where it
// says nothing, or nothing but a tag.
type Named struct {
	Name  string
	Image v1.Image
}

// OpenArchive reads a file, a directory, or with "-" what r gives. Close removes
// what it has unpacked, so images are used before.
func OpenArchive(path string, r io.Reader) (*Archive, error) {
	a, err := openArchive(path, r)
	if err != nil {
		return nil, fmt.Errorf("open image archive %s: %w", path, err)
	}
	return a, nil
}

func openArchive(path string, r io.Reader) (a *Archive, err error) {
	a = &Archive{path: path}
	if path != "-" {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			a.kind = ociLayout
			return a, nil
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	// Not /tmp, which may be memory.
	if a.dir, err = os.MkdirTemp("/var/tmp", "ingot-image-*"); err != nil {
		return nil, err
	}
	if err := a.unpack(r); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// Close removes what was unpacked.
func (a *Archive) Close() error {
	if a.dir == "" {
		return nil
	}
	return os.RemoveAll(a.dir)
}

// unpack copies the archive, decompressed, and finds out what it is. That of an
// OCI layout's files which such a layout has are taken out of it.
func (a *Archive) unpack(r io.Reader) error {
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	a.path = filepath.Join(a.dir, "archive.tar")
	f, err := os.OpenFile(a.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, plain); err != nil {
		return err
	}
	if a.kind, err = kindOf(f); err != nil || a.kind != ociLayout {
		return err
	}
	a.path = filepath.Join(a.dir, "layout")
	return unpackLayout(f, a.path)
}

// decompress passes on what is no archive that it knows.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case strings.HasPrefix(string(magic), "\x1f\x8b"):
		return gzip.NewReader(b)
	case string(magic) == "\x28\xb5\x2f\xfd":
		z, err := zstd.NewReader(b)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// kindOf tells by the names of the files: an archive of docker's is often both.
func kindOf(f *os.File) (archiveKind, error) {
	var layout bool
	var count int
	err := eachEntry(f, func(h *tar.Header, _ io.Reader) error {
		switch count++; clean(h.Name) {
		case "manifest.json":
			return errFound
		case "oci-layout":
			layout = true
		}
		return nil
	})
	switch {
	case errors.Is(err, errFound):
		return dockerSave, nil
	case err != nil:
		return "", fmt.Errorf("it is no tar archive: %w: %w", err, errdefs.ErrInvalidArgument)
	case layout:
		return ociLayout, nil
	case count == 0:
		return "", fmt.Errorf("it is empty: %w", errdefs.ErrInvalidArgument)
	}
	return rootFS, nil
}

var errFound = errors.New("found")

func eachEntry(f *os.File, visit func(*tar.Header, io.Reader) error) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	t := tar.NewReader(bufio.NewReaderSize(f, 64<<10))
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = visit(h, t)
		}
		if err != nil {
			return err
		}
	}
}

// unpackLayout takes the files of an image layout out of an archive: nothing
// outside of dir, whatever their names are.
func unpackLayout(f *os.File, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return eachEntry(f, func(h *tar.Header, r io.Reader) error {
		name := clean(h.Name)
		if h.Typeflag != tar.TypeReg || name != "oci-layout" && name != "index.json" && !strings.HasPrefix(name, "blobs/") {
			return nil
		}
		if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			return err
		}
		out, err := root.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, r)
		return errors.Join(err, out.Close())
	})
}

// Images are the archive's, for amd64 where there are several of one name.
func (a *Archive) Images() (list []Named, err error) {
	switch a.kind {
	case dockerSave:
		list, err = a.saved()
	case ociLayout:
		list, err = a.layout()
	default:
		err = fmt.Errorf("it is a root file system, not an image: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("it has no image: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("read image archive: %w", err)
	}
	return list, nil
}

func (a *Archive) saved() ([]Named, error) {
	open := func() (io.ReadCloser, error) { return os.Open(a.path) }
	manifest, err := tarball.LoadManifest(open)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var list []Named
	for _, d := range manifest {
		for _, tag := range d.RepoTags {
			t, err := name.NewTag(tag)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			img, err := tarball.Image(open, &t)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			list = append(list, Named{tag, img})
		}
	}
	if len(list) == 0 && len(manifest) == 1 {
		img, err := tarball.Image(open, nil)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		list = []Named{{"", img}}
	}
	return list, nil
}

func (a *Archive) layout() ([]Named, error) {
	index, err := layout.ImageIndexFromPath(a.path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return imagesOf(index, "")
}

// imagesOf are the images of an index, and of those in it.
func imagesOf(index v1.ImageIndex, called string) ([]Named, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var list []Named
	for _, d := range m.Manifests {
		if p := d.Platform; p != nil && (p.OS != "linux" || p.Architecture != "amd64") {
			continue // another machine's, or no image at all
		}
		called := called
		for _, key := range []string{"io.containerd.image.name", "org.opencontainers.image.ref.name"} {
			// The second is by the book a tag alone, which is no name.
			if n := d.Annotations[key]; strings.ContainsAny(n, "/:") {
				called = n
				break
			}
		}
		var more []Named
		switch {
		case d.MediaType == types.OCIImageIndex || d.MediaType == types.DockerManifestList:
			inner, err := index.ImageIndex(d.Digest)
			if err == nil {
				more, err = imagesOf(inner, called)
			}
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
		case d.MediaType.IsImage():
			img, err := index.Image(d.Digest)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			more = []Named{{called, img}}
		}
		list = append(list, more...)
	}
	return list, nil
}

// ShortName is what an image from elsewhere is called in the environment's
// registry: without its own registry's name.
func ShortName(ref string) (string, error) {
	tag, err := name.NewTag(ref, name.WithDefaultTag("latest"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return strings.TrimPrefix(tag.RepositoryStr(), "library/") + ":" + tag.TagStr(), nil
}

// IsRootFS says whether an archive is a root file system and no image.
func (a *Archive) IsRootFS() bool { return a.kind == rootFS }

// Import makes an image of an archive that is a root file system. Changes are
// lines of a Dockerfile: CMD, ENTRYPOINT, ENV, USER, WORKDIR, STOPSIGNAL, LABEL.
func (a *Archive) Import(changes []string) (v1.Image, error) {
	if a.kind != rootFS {
		return nil, fmt.Errorf("import %s: it is no root file system: %w", a.path, errdefs.ErrInvalidArgument)
	}
	var config v1.Config
	for _, c := range changes {
		if err := change(&config, c); err != nil {
			return nil, err
		}
	}
	layer, err := tarball.LayerFromFile(a.path, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", a.path, err)
	}
	return assemble(config, layer)
}

// change applies a Dockerfile's line to an image's configuration.
func change(c *v1.Config, line string) error {
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	rest = strings.TrimSpace(rest)
	if rest == "" {
		return fmt.Errorf("change %q: there is nothing after the word: %w", line, errdefs.ErrInvalidArgument)
	}
	switch strings.ToUpper(word) {
	case "CMD":
		c.Cmd = commandOf(rest)
	case "ENTRYPOINT":
		c.Entrypoint = commandOf(rest)
	case "USER":
		c.User = rest
	case "WORKDIR":
		c.WorkingDir = rest
	case "STOPSIGNAL":
		c.StopSignal = rest
	case "ENV", "LABEL":
		key, value, ok := strings.Cut(rest, "=")
		if !ok || key == "" {
			return fmt.Errorf("change %q: it must be KEY=VALUE: %w", line, errdefs.ErrInvalidArgument)
		}
		value = strings.Trim(value, `"`)
		if strings.ToUpper(word) == "ENV" {
			c.Env = append(slices.DeleteFunc(c.Env, func(e string) bool { return strings.HasPrefix(e, key+"=") }), key+"="+value)
			return nil
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		c.Labels[key] = value
	default:
		return fmt.Errorf("change %q: %s is none of CMD, ENTRYPOINT, ENV, USER, WORKDIR, STOPSIGNAL, LABEL: %w", line, word, errdefs.ErrInvalidArgument)
	}
	return nil
}

// commandOf is a command in a Dockerfile's two forms: a JSON list, or for a shell.
func commandOf(text string) []string {
	var list []string
	if json.Unmarshal([]byte(text), &list) == nil {
		return list
	}
	return []string{"/bin/sh", "-c", text}
}
