package build

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func sample(t *testing.T, text string) v1.Image {
	t.Helper()
	layer, err := memoryLayer(func(a *archive) { a.file("hello", 0o644, []byte(text)) })
	if err != nil {
		t.Fatal(err)
	}
	img, err := assemble(v1.Config{Cmd: []string{text}}, layer)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// saved is the form of docker save; the same images, as an OCI layout, are in dir.
func saved(t *testing.T, file, dir string, list map[string]v1.Image) {
	t.Helper()
	tags := map[name.Tag]v1.Image{}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for ref, img := range list {
		tag, err := name.NewTag(ref)
		if err != nil {
			t.Fatal(err)
		}
		tags[tag] = img
		other := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v0"})
		// As docker's builders do: an index for each name, and what is no image in it.
		index := mutate.AppendManifests(empty.Index,
			mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
			mutate.IndexAddendum{Add: sample(t, "attestation"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
		named := layout.WithAnnotations(map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": "v1"})
		if err := p.AppendIndex(index, named); err != nil {
			t.Fatal(err)
		}
		arm := layout.WithPlatform(v1.Platform{OS: "linux", Architecture: "arm64"})
		if err := p.AppendImage(sample(t, "arm"), arm, other); err != nil {
			t.Fatal(err)
		}
	}
	if err := tarball.MultiWriteToFile(file, tags); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
}

func TestArchives(t *testing.T) {
	dir := t.TempDir()
	one, two := sample(t, "one"), sample(t, "two")
	list := map[string]v1.Image{"docker.io/library/one:v1": one, "r.example:5000/team/two:latest": two}
	saved(t, dir+"/docker.tar", dir+"/layout", list)
	run(t, "tar", "-C", dir+"/layout", "-cf", dir+"/oci.tar", ".")
	run(t, "gzip", "-k", dir+"/docker.tar", dir+"/oci.tar")
	left, err := filepath.Glob("/var/tmp/ingot-image-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"docker.tar", "docker.tar.gz", "oci.tar", "oci.tar.gz", "layout", "-"} {
		path, in := filepath.Join(dir, file), io.Reader(nil)
		if file == "-" {
			b, err := os.ReadFile(dir + "/docker.tar.gz")
			if err != nil {
				t.Fatal(err)
			}
			path, in = "-", bytes.NewReader(b)
		}
		a, err := OpenArchive(path, in)
		if err != nil {
			t.Fatal(err)
		}
		images, err := a.Images()
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		got := map[string]string{}
		for _, n := range images {
			short, err := ShortName(n.Name)
			if err != nil {
				t.Errorf("%s: %q: %v", file, n.Name, err)
			}
			config, err := n.Image.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			got[short] = config.Config.Cmd[0]
			if err := validate.Image(n.Image); err != nil {
				t.Errorf("%s: %s: %v", file, n.Name, err)
			}
		}
		if d := cmp.Diff(map[string]string{"one:v1": "one", "team/two:latest": "two"}, got); d != "" {
			t.Errorf("%s: %s", file, d)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	if now, _ := filepath.Glob("/var/tmp/ingot-image-*"); len(now) > len(left) {
		t.Errorf("left behind: %v", now)
	}
}

func TestImport(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/hello", []byte("world"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-C", dir, "-czf", dir+"/root.tar.gz", "hello")
	a, err := OpenArchive(dir+"/root.tar.gz", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.Images(); !a.IsRootFS() || !errdefs.IsInvalidArgument(err) {
		t.Errorf("a root file system: %v", err)
	}
	img, err := a.Import([]string{`CMD ["a", "b c"]`, "entrypoint run me", "ENV A=1", "ENV A=2", `ENV B="x y"`, "USER u", "WORKDIR /w", "STOPSIGNAL SIGINT", "LABEL l=v"})
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	want := v1.Config{
		Cmd: []string{"a", "b c"}, Entrypoint: []string{"/bin/sh", "-c", "run me"}, Env: []string{"A=2", "B=x y"},
		User: "u", WorkingDir: "/w", StopSignal: "SIGINT", Labels: map[string]string{"l": "v"},
	}
	if d := cmp.Diff(want, config.Config); d != "" {
		t.Error(d)
	}
	r := tar.NewReader(mutate.Extract(img))
	if h, err := r.Next(); err != nil || h.Name != "hello" {
		t.Errorf("the first file: %+v, %v", h, err)
	}
	for _, bad := range []string{"", "CMD", "RUN x", "ENV A", "LABEL =v"} {
		if _, err := a.Import([]string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("change %q: %v", bad, err)
		}
	}
}

// What is no archive is refused, and no archive reaches out of its directory.
func TestBadArchives(t *testing.T) {
	dir := t.TempDir()
	entries := func(names ...string) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, n := range names {
			if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o644, Size: 2}); err != nil {
				t.Fatal(err)
			}
			io.WriteString(w, "{}")
		}
		w.Close()
		return b.String()
	}
	for name, text := range map[string]string{
		"empty": "", "noise": strings.Repeat("noise", 1000), "no gzip": "\x1f\x8b\x08 no", "no manifest": entries("manifest.json"),
		"no index": entries("oci-layout"), "out": entries("oci-layout", "index.json", "blobs/../../../out", "/blobs/../../out2"),
	} {
		file := filepath.Join(dir, "archive")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := OpenArchive(file, nil)
		if err == nil {
			_, err = a.Images()
			if out, _ := filepath.Glob(filepath.Join(a.dir, "out*")); len(out) > 0 {
				t.Errorf("%s: wrote %v", name, out)
			}
			a.Close()
		}
		if err == nil {
			t.Errorf("%s was taken", name)
		}
		if slices.Contains([]string{"empty", "noise", "no index"}, name) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ShortName("Bad Name"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
}
