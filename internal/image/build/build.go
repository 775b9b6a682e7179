// Package build makes the environment's own OCI images, a kernel and a small
// root file system, from Debian's packages, and pushes them. It owns a cache of
// packages and of what was taken out of them. The same packages make the same
// images, to the digest. It builds no image from a recipe: there are tools for that.
package build

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// DefaultCache is where packages are kept.
const DefaultCache = "/var/cache/ingot"

// Options are common to all images.
type Options struct {
	Cache    string       // a directory; empty is DefaultCache
	Progress func(string) // told what is being done, a line each; may be nil
}

func (o Options) cache() string { return cmp.Or(o.Cache, DefaultCache) }

func (o Options) say(format string, args ...any) {
	if o.Progress != nil {
		o.Progress(fmt.Sprintf(format, args...))
	}
}

// build is what all images have in common.
func build(ctx context.Context, o Options, what string, assemble func() (v1.Image, error)) (v1.Image, error) {
	cache, err := o.hold()
	if err != nil {
		return nil, fmt.Errorf("build %s image: %w", what, err)
	}
	defer cache.Close()
	img, err := assemble()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err() // the programs that were killed say odd things
	}
	if err != nil {
		return nil, fmt.Errorf("build %s image: %w", what, err)
	}
	return img, nil
}

// OCIImage is an image, for callers that only pass it on.
type OCIImage = v1.Image

// LabelVersion is the label with the version of what is in an image; its name
// is the OCI image spec's.
const LabelVersion = "org.opencontainers.image.version"

const labelTitle = "org.opencontainers.image.title"

// assemble makes an image of layers.
func assemble(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: "amd64",
		OS:           "linux",
		Created:      v1.Time{Time: epoch},
		Config:       config,
		RootFS:       v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, fmt.Errorf("assemble image: %w", err)
	}
	for _, l := range layers {
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "ingot image build"}, MediaType: types.OCILayer}); err != nil {
			return nil, fmt.Errorf("assemble image: %w", err)
		}
	}
	return img, nil
}

// epoch is the time of everything in an image.
var epoch = time.Unix(0, 0).UTC()

// archive writes a layer's tar, in the order of its calls; root owns everything.
type archive struct {
	*tar.Writer
	err error
}

func (a *archive) add(h tar.Header, data io.Reader) {
	if a.err != nil {
		return
	}
	h.ModTime, h.Format = epoch, tar.FormatPAX
	if a.err = a.WriteHeader(&h); a.err == nil && data != nil {
		_, a.err = io.Copy(a, data)
	}
}

func (a *archive) dir(name string, mode int64) {
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, nil)
}

func (a *archive) file(name string, mode int64, data []byte) {
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}, bytes.NewReader(data))
}

func (a *archive) link(name, target string) {
	a.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// compress writes a layer, and copies what it is before compression to plain.
func compress(w, plain io.Writer, fill func(*archive)) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	a := &archive{Writer: tar.NewWriter(io.MultiWriter(z, plain))}
	fill(a)
	if a.err == nil {
		a.err = a.Close()
	}
	if a.err == nil {
		a.err = z.Close()
	}
	return a.err
}

// memoryLayer is a small layer.
func memoryLayer(fill func(*archive)) (v1.Layer, error) {
	var b bytes.Buffer
	if err := compress(&b, io.Discard, fill); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return l, nil
}

// writeFile makes a whole file or none.
func writeFile(file string, fill func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), ".ingot-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := fill(f); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// clean makes a tar entry's name one without "./".
func clean(name string) string { return path.Clean("/" + name)[1:] }
