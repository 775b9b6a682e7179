package image

import (
	"context"
	"sync"
)

// flight runs one call per key at a time, for everyone who asks meanwhile. The
// call belongs to no caller: one that gives up leaves the others' alone, and
// only when the last has gone is it cancelled. Who comes then gets a call that begins
// once that one has cleared up.
type flight struct {
	mu    sync.Mutex // guards calls and what is in them
	calls map[string]*call
	wg    sync.WaitGroup
}

type call struct {
	cancel  context.CancelFunc
	done    chan struct{}
	err     error                // valid once done is closed
	waiters map[*waiter]struct{} // none: it is cancelled
}

type waiter struct{ progress func(Progress) }

func (f *flight) do(ctx context.Context, key string, progress func(Progress), work func(context.Context, func(Progress)) error) error {
	w := &waiter{progress: progress}
	c := f.join(ctx, key, w, work)
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		f.leave(c, w)
		return ctx.Err()
	}
}

func (f *flight) join(ctx context.Context, key string, w *waiter, work func(context.Context, func(Progress)) error) *call {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.calls[key]
	if before != nil && len(before.waiters) > 0 {
		before.waiters[w] = struct{}{}
		return before
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c := &call{cancel: cancel, done: make(chan struct{}), waiters: map[*waiter]struct{}{w: {}}}
	if f.calls == nil {
		f.calls = map[string]*call{}
	}
	f.calls[key] = c
	f.wg.Go(func() {
		defer cancel()
		if before != nil {
			<-before.done
		}
		c.err = work(ctx, func(p Progress) { f.tell(c, p) })
		f.mu.Lock()
		if f.calls[key] == c {
			delete(f.calls, key)
		}
		f.mu.Unlock()
		close(c.done)
	})
	return c
}

// leave forgets a waiter. A call that nobody waits for any more is cancelled.
func (f *flight) leave(c *call, w *waiter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(c.waiters, w)
	if len(c.waiters) == 0 {
		c.cancel()
	}
}

func (f *flight) tell(c *call, p Progress) {
	f.mu.Lock()
	var all []func(Progress)
	for w := range c.waiters {
		if w.progress != nil {
			all = append(all, w.progress)
		}
	}
	f.mu.Unlock()
	for _, progress := range all {
		progress(p)
	}
}

func (f *flight) close() {
	f.mu.Lock()
	for _, c := range f.calls {
		c.cancel()
	}
	f.mu.Unlock()
	f.wg.Wait()
}

// waiters are those who wait for a call.
func (f *flight) waiters() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.calls {
		n += len(c.waiters)
	}
	return n
}
