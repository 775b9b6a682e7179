package build

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Save writes an image to a file, in the form of docker save.
func Save(file, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref, name.WithDefaultTag("latest"))
	if err != nil {
		return fmt.Errorf("save %s: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if err := tarball.WriteToFile(file, tag, img); err != nil {
		return fmt.Errorf("save %s: %w", ref, err)
	}
	return nil
}

// Load reads the one image of a file in the form of docker save, or of a
// directory in the form of the OCI image layout.
func Load(path string) (v1.Image, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("load image: %w", err)
	}
	if !info.IsDir() {
		img, err := tarball.ImageFromPath(path, nil)
		if err != nil {
			return nil, fmt.Errorf("load image %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
		}
		return img, nil
	}
	index, err := layout.ImageIndexFromPath(filepath.Clean(path))
	if err != nil {
		return nil, fmt.Errorf("load image %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("load image %s: %w", path, err)
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("load image %s: it has %d images, not one: %w", path, len(m.Manifests), errdefs.ErrInvalidArgument)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		return nil, fmt.Errorf("load image %s: %w", path, err)
	}
	return img, nil
}
