package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"
)

// scriptMkimage is `mkimage FILE NAME CONFIG PATH=SOURCE…`: it writes an image as
// docker save does, with the configuration of a JSON file and programs, and
// nothing else.
func scriptMkimage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 {
		ts.Fatalf("usage: mkimage FILE NAME CONFIG PATH=SOURCE…")
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, a := range args[3:] {
		path, source, _ := strings.Cut(a, "=")
		b, err := os.ReadFile(ts.MkAbs(source))
		ts.Check(err)
		ts.Check(w.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(b))}))
		_, err = w.Write(b)
		ts.Check(err)
	}
	ts.Check(w.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	ts.Check(err)
	img, err := mutate.AppendLayers(empty.Image, l)
	ts.Check(err)
	config, err := img.ConfigFile()
	ts.Check(err)
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config = "linux", "amd64", v1.Config{}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[2])), &config.Config))
	img, err = mutate.ConfigFile(img, config)
	ts.Check(err)
	tag, err := name.NewTag(args[1])
	ts.Check(err)
	ts.Check(tarball.WriteToFile(ts.MkAbs(args[0]), tag, img))
}
