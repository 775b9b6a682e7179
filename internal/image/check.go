package image

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

const (
	// checkTime is how long Check looks at an image that is not unpacked yet.
	checkTime = 5 * time.Second
	// sureTime is how long what was found right is not looked at again: Prepare does.
	sureTime = 10 * time.Second
	// mostSure is how much of that is known.
	mostSure = 256
)

// Check refuses what can't work with the images that are here: a file that its
// image has not, an image that is none. The error is a *vm.FieldError. Of an
// image that is not here nothing is known; Prepare says the same of it later.
func (s *Store) Check(ctx context.Context, r Request) error {
	if s.silent.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	// Many microVMs that are asked for at once are mostly alike.
	key, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if s.sure(string(key)) {
		return nil
	}
	err = s.looks.do(ctx, string(key), nil, func(ctx context.Context, _ func(Progress)) error {
		return s.check(ctx, r)
	})
	switch {
	case err == nil:
		s.setSure(string(key))
	case errdefs.IsInvalidArgument(err):
		return err
	}
	return nil
}

func (s *Store) sure(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := s.right[key]
	return ok && time.Now().Before(until)
}

func (s *Store) setSure(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.right) >= mostSure {
		clear(s.right)
	}
	s.right[key] = time.Now().Add(sureTime)
}

// check is nil if all was looked at, and is right.
func (s *Store) check(ctx context.Context, r Request) error {
	looks := []func() error{
		func() error { return s.checkFile(ctx, "kernel", r.Kernel) },
		func() error { return s.checkImage(ctx, "root_volume", r.Root.Image) },
	}
	if r.Initrd != nil {
		looks = append(looks, func() error { return s.checkFile(ctx, "initrd", *r.Initrd) })
	}
	for i, v := range r.Volumes {
		if v.Image != "" {
			looks = append(looks, func() error { return s.checkImage(ctx, fmt.Sprintf("additional_volumes[%d]", i), v.Image) })
		}
	}
	errs := make([]error, len(looks))
	var all sync.WaitGroup
	for i, look := range looks {
		all.Go(func() { errs[i] = look() })
	}
	all.Wait()
	for _, err := range errs {
		if errdefs.IsInvalidArgument(err) {
			return err
		}
	}
	return cmp.Or(errs...)
}

func (s *Store) checkImage(ctx context.Context, volume, ref string) error {
	name, err := s.Resolve(ref)
	if err == nil {
		_, err = s.read(ctx, name)
	}
	return wrongImage(volume+".source.container_source", err)
}

func (s *Store) checkFile(ctx context.Context, use string, f vm.File) error {
	name, err := s.Resolve(f.Image)
	if err != nil {
		return wrongImage(use+".image", err)
	}
	i, err := s.read(ctx, name)
	if err != nil {
		return wrongImage(use+".image", err)
	}
	if _, ok := s.knownDir(i.chain); !ok {
		if err := s.unpackOnce(ctx, name, native); err != nil {
			return err
		}
	}
	_, err = s.file(ctx, use, i, f.Path)
	return err
}

// wrongImage makes a mistake one of that field.
func wrongImage(field string, err error) error {
	if errdefs.IsInvalidArgument(err) {
		return &vm.FieldError{Field: field, Problem: strings.TrimSuffix(err.Error(), ": "+errdefs.ErrInvalidArgument.Error())}
	}
	return err
}
