package image

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"

	"ingot/internal/vm"
)

// TestCheck: what can't work with the images that are here is refused, by the
// field that is wrong; what is not here is not judged.
func TestCheck(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	lacking := standard()
	lacking.Kernel.Path = "boot/none"
	if err := s.Check(t.Context(), lacking); err != nil {
		t.Errorf("before the image is here: %v", err)
	}
	if ids, err := s.Leases(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("a look left leases: %v, %v", ids, err)
	}
	// As `ingot run` pulls: for volumes, so the kernel's files are not there yet.
	for _, ref := range []string{"kernel", "base"} {
		if err := s.Pull(t.Context(), ref, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(*Request)
		field  string // empty: nothing is wrong
	}{
		"right":             {func(*Request) {}, ""},
		"no kernel":         {func(r *Request) { r.Kernel.Path = "boot/none" }, "kernel.filename"},
		"a directory":       {func(r *Request) { r.Kernel.Path = "boot" }, "kernel.filename"},
		"a way out":         {func(r *Request) { r.Kernel.Path = "boot/out" }, "kernel.filename"},
		"a link":            {func(r *Request) { r.Kernel.Path = "boot/latest" }, ""},
		"a root as kernel":  {func(r *Request) { r.Kernel.Image = "base" }, "kernel.filename"},
		"no initrd":         {func(r *Request) { r.Initrd.Path = "boot/none" }, "initrd.filename"},
		"none asked for":    {func(r *Request) { r.Initrd = nil }, ""},
		"no such kernel":    {func(r *Request) { r.Kernel.Image = "none" }, ""},
		"no such root":      {func(r *Request) { r.Root.Image = "none" }, ""},
		"no name of a root": {func(r *Request) { r.Root.Image = "Ba se" }, "root_volume.source.container_source"},
	} {
		r := standard()
		c.change(&r)
		err := s.Check(t.Context(), r)
		var field *vm.FieldError
		switch {
		case c.field == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.field != "" && (!errors.As(err, &field) || field.Field != c.field || !errdefs.IsInvalidArgument(err)):
			t.Errorf("%s: %v, want %s", name, err, c.field)
		}
		// The same is found later, where the door could not know it.
		_, err = s.Prepare(t.Context(), "flintlock/ns/check/01", r, nil)
		if c.field != "" && c.field != "root_volume.source.container_source" && (!errors.As(err, &field) || field.Field != c.field) {
			t.Errorf("%s: prepared: %v, want %s", name, err, c.field)
		}
	}
}

// What is in a registry and no image is told as that, at once.
func TestNoImage(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	chart := mutate.ConfigMediaType(empty.Image, "application/vnd.cncf.helm.config.v1+json")
	chart, err := mutate.AppendLayers(chart, static.NewLayer([]byte("no tar"), "application/vnd.cncf.helm.chart.content.v1.tar+gzip"))
	if err != nil {
		t.Fatal(err)
	}
	l.pushImage(t, "chart", chart)
	l.pushImage(t, "empty", empty.Image)
	foreign, err := mutate.AppendLayers(empty.Image, layer(t, rootFiles...))
	if err != nil {
		t.Fatal(err)
	}
	l.pushIndex(t, "foreign", mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: foreign, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}},
	}))
	for _, c := range []struct {
		ref  string
		is   func(error) bool
		here bool // so that the door knows
	}{{"chart", errdefs.IsInvalidArgument, true}, {"empty", errdefs.IsInvalidArgument, true}, {"foreign", errdefs.IsNotFound, false}} {
		if err := s.Pull(t.Context(), c.ref, "", nil); !c.is(err) || !strings.Contains(err.Error(), c.ref) {
			t.Errorf("pull %s: %v", c.ref, err)
		}
		r := standard()
		r.Root.Image = c.ref
		if _, err := s.Prepare(t.Context(), "flintlock/ns/none/01", r, nil); !c.is(err) || !strings.Contains(err.Error(), c.ref) {
			t.Errorf("prepare %s: %v", c.ref, err)
		}
		var field *vm.FieldError
		err := s.Check(t.Context(), r)
		if c.here && (!errors.As(err, &field) || field.Field != "root_volume.source.container_source") || !c.here && err != nil {
			t.Errorf("check %s: %v", c.ref, err)
		}
	}
	if ids, err := s.Leases(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("leases were left: %v, %v", ids, err)
	}
}

func BenchmarkCheck(b *testing.B) {
	l := newLab(b)
	l.pushStandard(b)
	s := l.open(b)
	prepare(b, s, "flintlock/ns/bench/01", standard())
	for b.Loop() {
		clear(s.right)
		if err := s.Check(b.Context(), standard()); err != nil {
			b.Fatal(err)
		}
	}
}
