package image

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestKilledInClaims: containerd dies while microVMs come and go. Afterwards
// each of them can be prepared and released, and nothing else is there.
func TestKilledInClaims(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	prepare(t, s, "flintlock/ns/first/00", standard())
	lease := func(i int) string { return fmt.Sprintf("flintlock/ns/vm/%d", i) }
	stop := make(chan struct{})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// Errors are what the kill is for; what counts is the state after it.
				if _, err := s.Prepare(t.Context(), lease(i), standard(), nil); err == nil && i%2 == 0 {
					s.Release(t.Context(), lease(i))
				}
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	l.kill(t)
	l.start(t)
	close(stop)
	all.Wait()
	for i := range 8 {
		p := prepare(t, s, lease(i), standard())
		run(t, "e2fsck", "-fn", p.Volumes["root"])
	}
	for i := range 8 {
		if err := s.Release(t.Context(), lease(i)); err != nil {
			t.Error(err)
		}
	}
	if err := s.Release(t.Context(), "flintlock/ns/first/00"); err != nil {
		t.Error(err)
	}
	l.checkReleased(t, s, Prepared{})
}

// TestLostVolume: the power failed after containerd's database had a volume and
// before its file was on the disk. It is made again.
func TestLostVolume(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	const lease = "flintlock/ns/vm/01"
	p := prepare(t, s, lease, standard())
	writeByte(t, p.Volumes["data"], 100<<20, 'x')
	l.kill(t)
	if err := os.Remove(p.Volumes["root"]); err != nil {
		t.Fatal(err)
	}
	l.start(t)
	again := prepare(t, s, lease, standard())
	run(t, "e2fsck", "-fn", again.Volumes["root"])
	if readByte(t, again.Volumes["data"], 100<<20) != 'x' {
		t.Error("the other volume was made again too")
	}
	if err := s.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	l.checkReleased(t, s, again)
}

// TestChurn: microVMs come and go while images are pulled, and the garbage
// collector runs all the time.
func TestChurn(t *testing.T) {
	l := newLab(t)
	l.pushStandard(t)
	s := l.open(t)
	prepare(t, s, "flintlock/ns/first/00", standard())
	for i := range 4 {
		l.push(t, fmt.Sprint("other", i), rootFiles, []file{{name: fmt.Sprint("file", i), data: noise(100_000 + i)}})
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			r := standard()
			if i < 4 {
				r.Root.Image = fmt.Sprint("other", i)
			}
			for n := range 10 {
				lease := fmt.Sprintf("flintlock/ns/vm%d/%d", i, n)
				p, err := s.Prepare(t.Context(), lease, r, nil)
				if err != nil {
					t.Error(err)
					return
				}
				for id, path := range p.Volumes {
					if _, err := os.Stat(path); err != nil {
						t.Errorf("%s: volume %s: %v", lease, id, err)
					}
				}
				if err := s.Release(t.Context(), lease); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if err := s.Release(t.Context(), "flintlock/ns/first/00"); err != nil {
		t.Error(err)
	}
	// base has two layers, the others share its first and have one more each.
	files, err := filepath.Glob(filepath.Join(l.dir, "pool/blockfile/snapshots/*"))
	if err != nil || len(files) != 6 {
		t.Errorf("files in the pool: %v, %v", files, err)
	}
}
