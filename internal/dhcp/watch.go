package dhcp

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// watcher is somebody who is told of changes.
type watcher struct {
	changes chan Lease
}

// A watcher that is this many changes behind is dropped.
const watchBacklog = 4096

// tell tells the watchers of a change. It never waits for them.
func (s *Server) tell(r *record) {
	if len(s.watch) == 0 {
		return
	}
	l := r.lease()
	for w := range s.watch {
		select {
		case w.changes <- l:
		default:
			delete(s.watch, w)
			close(w.changes)
		}
	}
}

// Watch calls f with every lease that changes, until ctx ends or f fails. An
// acknowledgement may be told before it is on disk. Leases that expire are not
// told: their end is known.
func (s *Server) Watch(ctx context.Context, f func(Lease) error) error {
	w := &watcher{changes: make(chan Lease, watchBacklog)}
	s.mu.Lock()
	s.watch[w] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watch, w)
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case l, ok := <-w.changes:
			if !ok {
				return fmt.Errorf("watch leases: too slow for what changes: %w", errdefs.ErrUnavailable)
			}
			if err := f(l); err != nil {
				return err
			}
		}
	}
}
