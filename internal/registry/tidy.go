package registry

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/opencontainers/go-digest"
)

// A push sends the blobs first, then what names them, and goes on if the registry
// was started again between. So what is younger than this is not garbage.
const pushTime = time.Hour

// clean removes what images that were deleted have left, and what a registry that
// was killed has. It must not run beside a push, so it does before there can be one.
func (s *Server) clean(ctx context.Context) error {
	young, err := s.tidy()
	if err != nil {
		return err
	}
	if err := s.collect(ctx, young); err != nil {
		return err
	}
	_, err = s.tidy()
	return err
}

// collect deletes the parts of images that were deleted, but for young ones. What was
// pushed and has no name any more stays: somebody may mean it by its digest.
func (s *Server) collect(ctx context.Context, young map[digest.Digest]bool) error {
	_, err := os.Stat(s.store("repositories"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing was ever pushed
	}
	disk := sparing{filesystem.New(filesystem.DriverParameters{RootDirectory: s.c.Dir, MaxThreads: 25}), young}
	images, err := storage.NewRegistry(ctx, disk, storage.EnableDelete)
	if err != nil {
		return err
	}
	return storage.MarkAndSweep(ctx, disk, images, storage.GCOpts{Quiet: true})
}

// sparing deletes neither blobs that are young nor links to them.
type sparing struct {
	driver.StorageDriver
	young map[digest.Digest]bool
}

func (d sparing) Delete(ctx context.Context, path string) error {
	hex := filepath.Base(strings.TrimSuffix(path, "/link"))
	if d.young[digest.NewDigestFromEncoded(digest.SHA256, hex)] {
		return nil
	}
	return d.StorageDriver.Delete(ctx, path)
}

// store is where distribution has something.
func (s *Server) store(parts ...string) string {
	return filepath.Join(append([]string{s.c.Dir, "docker/registry/v2"}, parts...)...)
}

// tidy removes what was being written when a registry was killed: uploads, which
// no client can go on with, temporary files, links to what is not there, tags of
// nothing, and directories without a file. It returns what young links mean.
func (s *Server) tidy() (young map[digest.Digest]bool, err error) {
	young = map[digest.Digest]bool{}
	// Links to blobs come before those to links: revisions before tags.
	err = filepath.WalkDir(s.store(), func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == "_uploads",
			d.IsDir() && strings.HasSuffix(filepath.Dir(path), "/_manifests/tags") && !s.whole(filepath.Join(path, "current/link")):
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			return fs.SkipDir
		case d.IsDir():
			return nil
		case strings.HasSuffix(path, ".tmp"), d.Name() == "link" && !s.whole(path):
			return os.Remove(path)
		case d.Name() == "link":
			info, err := d.Info()
			if err == nil && time.Since(info.ModTime()) < pushTime {
				young[linked(path)] = true
			}
			return err
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	_, err = prune(filepath.Join(s.c.Dir, "docker")) // what is beside it is not ours
	return young, err
}

// linked is what a link means; empty if it is none.
func linked(path string) digest.Digest {
	b, err := os.ReadFile(path)
	d := digest.Digest(b)
	if err != nil || d.Validate() != nil {
		return ""
	}
	return d
}

// whole says whether there is what a link means: a revision of a tag's, else a blob.
func (s *Server) whole(link string) bool {
	d := linked(link)
	if d == "" {
		return false
	}
	at := s.store("blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
	if repository, _, ok := strings.Cut(link, "/_manifests/tags/"); ok {
		at = filepath.Join(repository, "_manifests/revisions", d.Algorithm().String(), d.Encoded(), "link")
	}
	_, err := os.Stat(at)
	return err == nil
}

// prune removes the directories in dir that have no file in them, and says whether dir
// is such a one. The layers' of a repository that has files stays: collect wants it.
func prune(dir string) (empty bool, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	empty = true
	for _, e := range entries {
		if !e.IsDir() {
			empty = false
			continue
		}
		below := filepath.Join(dir, e.Name())
		none, err := prune(below)
		if err == nil && none && e.Name() != "_layers" {
			err = os.RemoveAll(below)
		}
		if err != nil {
			return false, err
		}
		empty = empty && none
	}
	return empty, err
}
