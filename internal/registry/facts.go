package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // by its name, the handlers find it too
	"github.com/distribution/reference"
)

// Facts are what the registry holds.
type Facts struct {
	Listen       string
	Repositories []Repository
}

// Repository is a name and its tags, both sorted.
type Repository struct {
	Name string
	Tags []string
}

// Facts lists all repositories.
func (s *Server) Facts(ctx context.Context) (Facts, error) {
	f := Facts{Listen: s.c.Listen}
	images, err := storage.NewRegistry(ctx, filesystem.New(filesystem.DriverParameters{RootDirectory: s.c.Dir, MaxThreads: 25}))
	if err != nil {
		return Facts{}, fmt.Errorf("list registry: %w", err)
	}
	names, err := names(ctx, images)
	if err != nil {
		return Facts{}, fmt.Errorf("list registry: %w", err)
	}
	for _, name := range names {
		r, err := repository(ctx, images, name)
		if err != nil {
			return Facts{}, fmt.Errorf("list registry: %s: %w", name, err)
		}
		f.Repositories = append(f.Repositories, r)
	}
	return f, nil
}

func names(ctx context.Context, images distribution.Namespace) ([]string, error) {
	var all []string
	page := make([]string, 100)
	for last := ""; ; last = all[len(all)-1] {
		n, err := images.Repositories(ctx, page, last)
		all = append(all, page[:n]...)
		switch {
		case errors.Is(err, io.EOF) || isEmpty(err):
			slices.Sort(all)
			return all, nil
		case err != nil:
			return nil, err
		case n == 0:
			return all, nil
		}
	}
}

// isEmpty tells a registry that was never pushed to: its directory is missing.
func isEmpty(err error) bool {
	var missing driver.PathNotFoundError
	return errors.As(err, &missing)
}

func repository(ctx context.Context, images distribution.Namespace, name string) (Repository, error) {
	named, err := reference.WithName(name)
	if err != nil {
		return Repository{}, err
	}
	repo, err := images.Repository(ctx, named)
	if err != nil {
		return Repository{}, err
	}
	tags, err := repo.Tags(ctx).All(ctx)
	var unknown distribution.ErrRepositoryUnknown
	if err != nil && !errors.As(err, &unknown) {
		return Repository{}, err
	}
	slices.Sort(tags)
	return Repository{Name: name, Tags: tags}, nil
}
