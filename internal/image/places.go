package image

import (
	"context"
	"runtime"
	"slices"
	"sync"
)

// How many images are got at the same time. A registry that is slow, or does not
// answer, has no more places than one of them may have: the rest is the others'.
const (
	mostPulls     = 16
	mostPullsEach = 4 // from one registry
)

// places are those that work may be done in. Who comes first is served first, but does
// not hold up who wants of another kind.
type places struct {
	all, each int

	mu    sync.Mutex // guards what follows
	used  map[string]int
	sum   int
	queue []*place
}

type place struct {
	kind  string
	ready chan struct{} // closed once it is had
}

func newPlaces(all, each int) *places {
	return &places{all: all, each: each, used: map[string]int{}}
}

// newUnpacks are those of images that are unpacked, which is work for CPUs and disks.
func newUnpacks() *places { return newPlaces(2*runtime.NumCPU(), 2*runtime.NumCPU()) }

// take waits for a place, and calls waiting before if there is none. It must be given
// back.
func (p *places) take(ctx context.Context, kind string, waiting func()) (give func(), err error) {
	w := &place{kind: kind, ready: make(chan struct{})}
	p.mu.Lock()
	p.queue = append(p.queue, w)
	p.serve()
	p.mu.Unlock()
	select {
	case <-w.ready:
		return p.giver(w), nil
	default:
	}
	waiting()
	select {
	case <-w.ready:
		return p.giver(w), nil
	case <-ctx.Done():
		p.leave(w)
		return nil, context.Cause(ctx)
	}
}

// leave gives up waiting.
func (p *places) leave(w *place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.queue, w); i >= 0 {
		p.queue = slices.Delete(p.queue, i, i+1)
		return
	}
	p.free(w) // it came meanwhile
}

func (p *places) giver(w *place) func() {
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.free(w)
	})
}

// free takes a place back. The caller holds p.mu.
func (p *places) free(w *place) {
	p.sum--
	if p.used[w.kind]--; p.used[w.kind] == 0 {
		delete(p.used, w.kind)
	}
	p.serve()
}

// serve gives away what places there are. The caller holds p.mu.
func (p *places) serve() {
	p.queue = slices.DeleteFunc(p.queue, func(w *place) bool {
		if p.sum >= p.all || p.used[w.kind] >= p.each {
			return false
		}
		p.sum++
		p.used[w.kind]++
		close(w.ready)
		return true
	})
}
