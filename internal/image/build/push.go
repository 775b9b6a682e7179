package build

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Registry is where images are pushed to, and how.
type Registry struct {
	Address  string // host:port
	CAFile   string // PEM; empty: the machine's own
	User     string // empty: anonymous
	Password string
}

// Image is one that a registry has.
type Image struct {
	Name   string // with its tag: kernel:latest
	Digest string
	Size   int64 // compressed
	Labels map[string]string
}

// Push sends an image, without the blobs that are there, and returns its digest.
func Push(ctx context.Context, r Registry, ref string, img v1.Image) (string, error) {
	tag, options, err := r.open(ctx, ref)
	if err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	if err := remote.Write(tag, img, options...); err != nil {
		return "", fmt.Errorf("push %s: %w", ref, meaning(err))
	}
	d, err := img.Digest()
	if err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return d.String(), nil
}

// Exists says whether a registry has an image of that name.
func Exists(ctx context.Context, r Registry, ref string) (bool, error) {
	d, err := Digest(ctx, r, ref)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return d != "", err
}

// Digest is that of a registry's image.
func Digest(ctx context.Context, r Registry, ref string) (string, error) {
	tag, options, err := r.open(ctx, ref)
	if err != nil {
		return "", fmt.Errorf("look up %s: %w", ref, err)
	}
	d, err := remote.Head(tag, options...)
	if err != nil {
		return "", fmt.Errorf("look up %s: %w", ref, meaning(err))
	}
	return d.Digest.String(), nil
}

// FullName completes a short name as a registry's hosts do.
func FullName(r Registry, ref string) (string, error) {
	tag, err := name.NewTag(ref, name.WithDefaultRegistry(r.Address), name.WithDefaultTag("latest"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return tag.Name(), nil
}

// Delete deletes an image; one that has another name too loses this one. The
// registry deletes the layers at its next start.
func Delete(ctx context.Context, r Registry, ref string) error {
	tag, options, err := r.open(ctx, ref)
	if err != nil {
		return fmt.Errorf("delete %s: %w", ref, err)
	}
	if err := remove(tag, options); err != nil {
		return fmt.Errorf("delete %s: %w", ref, meaning(err))
	}
	return nil
}

func remove(tag name.Tag, options []remote.Option) error {
	d, err := remote.Head(tag, options...)
	if err != nil {
		return err
	}
	tags, err := remote.List(tag.Repository, options...)
	if err != nil {
		return err
	}
	for _, t := range tags {
		if t == tag.TagStr() {
			continue
		}
		if other, err := remote.Head(tag.Tag(t), options...); err != nil || other.Digest == d.Digest {
			return errors.Join(err, remote.Delete(tag, options...))
		}
	}
	return remote.Delete(tag.Digest(d.Digest.String()), options...)
}

// List is what a registry has, in the order of names.
func List(ctx context.Context, r Registry) ([]Image, error) {
	reg, err := name.NewRegistry(r.Address)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	options, err := r.options(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	repositories, err := remote.Catalog(ctx, reg, options...)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", meaning(err))
	}
	var list []Image
	for _, repository := range repositories {
		repo := reg.Repo(repository)
		tags, err := remote.List(repo, options...)
		if err = meaning(err); err != nil && !errdefs.IsNotFound(err) { // it has lost its last tag
			return nil, fmt.Errorf("list images: %w", err)
		}
		for _, t := range tags {
			img, err := describe(repo.Tag(t), options)
			if err != nil {
				return nil, fmt.Errorf("list images: %s:%s: %w", repository, t, meaning(err))
			}
			img.Name = repository + ":" + t
			list = append(list, img)
		}
	}
	slices.SortFunc(list, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func describe(tag name.Tag, options []remote.Option) (Image, error) {
	img, err := remote.Image(tag, options...)
	if err != nil {
		return Image{}, err
	}
	m, err := img.Manifest()
	if err != nil {
		return Image{}, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return Image{}, err
	}
	digest, err := img.Digest()
	if err != nil {
		return Image{}, err
	}
	i := Image{Digest: digest.String(), Labels: config.Config.Labels}
	for _, l := range m.Layers {
		i.Size += l.Size
	}
	return i, nil
}

// open resolves a short name (kernel, kernel:v2) or a whole reference.
func (r Registry) open(ctx context.Context, ref string) (name.Tag, []remote.Option, error) {
	tag, err := name.NewTag(ref, name.WithDefaultRegistry(r.Address), name.WithDefaultTag("latest"))
	if err != nil {
		return tag, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	options, err := r.options(ctx)
	return tag, options, err
}

func (r Registry) options(ctx context.Context) ([]remote.Option, error) {
	auth := authn.Anonymous
	if r.User != "" {
		auth = authn.FromConfig(authn.AuthConfig{Username: r.User, Password: r.Password})
	}
	t, err := r.transport()
	if err != nil {
		return nil, err
	}
	return []remote.Option{remote.WithContext(ctx), remote.WithAuth(auth), remote.WithTransport(t)}, nil
}

func (r Registry) transport() (*http.Transport, error) {
	t := remote.DefaultTransport.(*http.Transport).Clone()
	if r.CAFile != "" {
		pem, err := os.ReadFile(r.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the registry's CA: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read the registry's CA: no certificate in %s", r.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}
	}
	return t, nil
}

// meaning gives a registry's refusal its class.
func meaning(err error) error {
	if err == nil {
		return nil
	}
	var refused *transport.Error
	if !errors.As(err, &refused) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	switch refused.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnauthenticated)
	case http.StatusForbidden:
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return err
}
