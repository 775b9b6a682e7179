package build

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
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
