package registry

import (
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// age has all files of a registry be from yesterday.
func age(t *testing.T, dir string) {
	t.Helper()
	yesterday := time.Now().Add(-24 * time.Hour)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, yesterday, yesterday)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// idle is a registry that does not run.
func idle(t *testing.T, dir string) *Server {
	t.Helper()
	s, err := New(Config{Dir: dir, Listen: "x", CertFile: "x", KeyFile: "x"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func clean(t *testing.T, dir string) {
	t.Helper()
	if err := idle(t, dir).clean(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func tagOf(t *testing.T, address, text string) name.Tag {
	t.Helper()
	tag, err := name.NewTag(address + "/" + text)
	if err != nil {
		t.Fatal(err)
	}
	return tag
}

func digestOf(t *testing.T, of interface{ Digest() (v1.Hash, error) }) v1.Hash {
	t.Helper()
	d, err := of.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// pulls says whether all of an image is there.
func pulls(t *testing.T, tag name.Tag, transport http.RoundTripper) {
	t.Helper()
	img, err := remote.Image(tag, remote.WithTransport(transport))
	if err == nil {
		err = validate.Image(img)
	}
	if err != nil {
		t.Errorf("pull %s: %v", tag, err)
	}
}

// What deleted images have left goes at a later start, and nothing else.
func TestCollect(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "registry")
	blobs := func() int {
		found, err := filepath.Glob(filepath.Join(dir, "docker/registry/v2/blobs/sha256/*/*/data"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	clean(t, dir) // nothing was pushed
	_, address, transport := start(t, dir)
	for _, ref := range []string{"kept:latest", "kept:latest", "gone:latest"} { // the first loses its name
		if err := push(address, ref, transport, owner); err != nil {
			t.Fatal(err)
		}
	}
	gone := tagOf(t, address, "gone:latest")
	d, err := remote.Head(gone, remote.WithTransport(transport))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Delete(gone.Digest(d.Digest.String()), remote.WithTransport(transport), remote.WithAuth(owner)); err != nil {
		t.Fatal(err)
	}
	before := blobs()
	if before < 11 { // three images of four parts, of which one has lost its manifest
		t.Fatalf("%d blobs before", before)
	}
	clean(t, dir)
	if n := blobs(); n < 11 {
		t.Errorf("%d blobs of %d are left, though a push may want them", n, before)
	}
	age(t, dir)
	clean(t, dir)
	if n := blobs(); n != 8 {
		t.Errorf("%d blobs after, want 8", n)
	}
	if found, err := filepath.Glob(filepath.Join(dir, "docker/registry/v2/repositories/*")); err != nil || len(found) != 1 {
		t.Errorf("repositories: %v, %v", found, err)
	}
	pulls(t, tagOf(t, address, "kept:latest"), transport)
}

// A push goes on where the registry was started again between blobs and manifest.
func TestPushThroughRestart(t *testing.T) {
	dir := t.TempDir()
	_, address, transport := start(t, dir)
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range layers {
		if err := remote.WriteLayer(tagOf(t, address, "app:1").Context(), layer, remote.WithAuth(owner), remote.WithTransport(transport)); err != nil {
			t.Fatal(err)
		}
	}
	_, address, transport = start(t, dir)
	for _, layer := range layers {
		blob := tagOf(t, address, "app:1").Digest(digestOf(t, layer).String())
		got, err := remote.Layer(blob, remote.WithTransport(transport))
		if err == nil {
			err = validate.Layer(got)
		}
		if err != nil {
			t.Errorf("after a restart: %v", err)
		}
	}
	if err := remote.Write(tagOf(t, address, "app:1"), img, remote.WithAuth(owner), remote.WithTransport(transport)); err != nil {
		t.Fatal(err)
	}
	clean(t, dir)
	pulls(t, tagOf(t, address, "app:1"), transport)
}

// What a registry that was killed in a push or a deletion has left goes, and nothing else.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	s, address, transport := start(t, dir)
	for _, ref := range []string{"kept:latest", "killed:whole", "killed:unset", "killed:gone"} {
		if err := push(address, ref, transport, owner); err != nil {
			t.Fatal(err)
		}
	}
	layer, err := random.Layer(1000, types.DockerLayer)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteLayer(tagOf(t, address, "begun:1").Context(), layer, remote.WithAuth(owner), remote.WithTransport(transport)); err != nil {
		t.Fatal(err)
	}
	tree := func() (files []string) {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if !d.IsDir() || strings.HasSuffix(path, "/half") || strings.HasSuffix(path, "/_manifests") {
				files = append(files, strings.TrimPrefix(path, dir))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	before := tree()
	if layer, err = random.Layer(1000, types.DockerLayer); err != nil {
		t.Fatal(err)
	}
	digest := digestOf(t, layer)
	// As of steps that were not reached.
	for path, text := range map[string]string{
		"repositories/half/_uploads/1/startedat":                             "2026-01-02T03:04:05Z",
		"repositories/half/_uploads/1/data":                                  "half of it",
		"repositories/kept/_layers/sha256/" + digest.Hex + "/link.1.tmp":     "sha256:",
		"repositories/kept/_layers/sha256/" + digest.Hex + "/link":           digest.String(), // the blob was deleted, and not yet this
		"repositories/killed/_manifests/tags/new/index/sha256/1/link.2.tmp":  "sha256:",
		"repositories/killed/_manifests/tags/torn/current/link":              "sha256:12",
		"repositories/begun/_manifests/revisions/sha256/2/link.6.tmp":        "sha256:",
		"blobs/sha256/00/00" + digest.Hex[2:] + "/data.3.tmp":                "half of it",
		"repositories/team/app/_manifests/revisions/sha256/1/link.4.tmp":     "sha256:",
		"repositories/team/app/_manifests/tags/v1/current/link":              digest.String(),
		"repositories/team/app/_layers/sha256/" + digest.Hex + "/link.5.tmp": "",
	} {
		path = s.store(path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unset := s.store("repositories/killed/_manifests/tags/unset")
	if err := os.RemoveAll(unset + "/current"); err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(tagOf(t, address, "killed:gone"), remote.WithTransport(transport))
	if err != nil {
		t.Fatal(err)
	}
	// Its tag would have been next.
	if err := os.Remove(s.store("repositories/killed/_manifests/revisions/sha256", d.Digest.Hex, "link")); err != nil {
		t.Fatal(err)
	}
	clean(t, dir)
	var want []string
	for _, path := range before {
		tags := "/docker/registry/v2/repositories/killed/_manifests/tags/"
		if !strings.HasPrefix(path, tags+"unset/") && !strings.HasPrefix(path, tags+"gone/") && !strings.Contains(path, d.Digest.Hex) {
			want = append(want, path)
		}
	}
	if diff := cmp.Diff(want, tree()); diff != "" {
		t.Errorf("what is left: %s", diff)
	}
	facts, err := s.Facts(t.Context())
	if diff := cmp.Diff([]Repository{{"kept", []string{"latest"}}, {"killed", []string{"whole"}}}, facts.Repositories); err != nil || diff != "" {
		t.Errorf("facts: %v, %s", err, diff)
	}
	for _, tag := range []string{"kept:latest", "killed:whole"} {
		pulls(t, tagOf(t, address, tag), transport)
	}
	if err := push(address, "team/app:v1", transport, owner); err != nil {
		t.Error(err)
	}
}
