package dhcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// journal is the lease log on disk. One goroutine writes it: all that came while
// it was writing goes into its next write, with one fdatasync for all. Another
// rewrites it without what is no longer true, while the first goes on.
type journal struct {
	path string
	// content writes the whole log as it should be.
	content func(io.Writer) error
	// sent gets what was waiting for a write, once that is on disk.
	sent    func([]*reply)
	warn    func(error) // of a compaction that failed: the old log stays good
	full    func(error) // there is no room to write; nil: there is again
	stopped chan struct{}
	wake    chan struct{} // there is something to write
	room    chan struct{} // the batch was taken

	mu   sync.Mutex
	next *batch // guarded by mu

	// The rest is the writer's.
	file    *os.File
	size    int64 // of the log
	garbage int64 // of what the log has twice, about
	stale   bool  // there is an older entry of some address
	urgent  bool  // that scripts must not see
	waiting []func(error)
	last    time.Time     // when the last compaction ended
	took    time.Duration // how long it took
	failed  bool          // the last compaction did
	work    *compaction   // nil: none is running
}

// batch is what is written together.
type batch struct {
	text    []byte
	replies []*reply
	written []func(error) // to be told once it is on disk
	waiting []func(error) // likewise, and once a compaction has ended that has it
	garbage int64
	urgent  bool
}

// compaction is a new log in the making.
type compaction struct {
	file *os.File
	// tail is what was logged since the work began; once the content is written,
	// the writer adds it, and writes to both logs until the new one has the name.
	tail    []byte
	both    bool
	size    int64
	waiting []func(error)
	began   time.Time
	events  chan error // first of the content, then of the name
	again   chan struct{}
}

const (
	maxBatch = 1024
	maxText  = 1 << 20
	// The log is compacted once its garbage is three times what lives in it, and
	// this much. New leases are none, however fast they come.
	slack = 64 << 10
	// A new log goes to the disk in pieces, between which the old one's writes get
	// their turn.
	piece = 512 << 10
	// What scripts would show wrong for a while is compacted this often at most,
	// and in this share of the time.
	pause = time.Second
	share = 100
)

// openJournal opens a log. Unless it is clean, it is written anew.
func openJournal(path string, clean bool, content func(io.Writer) error) (*journal, error) {
	j := &journal{
		path: path, content: content, next: &batch{}, sent: func([]*reply) {}, warn: func(error) {}, full: func(error) {},
		stopped: make(chan struct{}), wake: make(chan struct{}, 1), room: make(chan struct{}, 1),
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("open lease log: %w", err)
	}
	if clean {
		// Of a compaction that was killed.
		if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("open lease log: %w", err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open lease log: %w", err)
		}
		// What the last process wrote may not be on disk: it was not acknowledged.
		size, err := f.Seek(0, io.SeekEnd)
		if err = errors.Join(err, f.Sync()); err != nil {
			return nil, fmt.Errorf("open lease log: %w", errors.Join(err, f.Close()))
		}
		j.file, j.size = f, size
		return j, nil
	}
	f, size, err := j.rewrite()
	if err == nil {
		err = j.rename()
	}
	if err != nil {
		return nil, fmt.Errorf("compact lease log: %w", err)
	}
	j.file, j.size = f, size
	return j, nil
}

// put adds text to the next write. out leaves after it. It does not wait, so that
// its caller may hold the table: the log has changes in the table's order.
func (j *journal) put(text []byte, out *reply, c change) {
	j.mu.Lock()
	b := j.next
	b.text = append(b.text, text...)
	b.urgent = b.urgent || c.urgent
	if c.renewed {
		b.garbage += int64(len(text))
	}
	if out != nil {
		b.replies = append(b.replies, out)
	}
	j.mu.Unlock()
	poke(j.wake)
}

// pace waits while the next write is full.
func (j *journal) pace() {
	for {
		j.mu.Lock()
		full := len(j.next.replies) >= maxBatch || len(j.next.text) > maxText
		j.mu.Unlock()
		if !full {
			return
		}
		select {
		case <-j.room:
		case <-j.stopped:
			return
		}
	}
}

// order adds text to the next write like put, and returns what waits until it is
// on disk; if alone, until all older entries are gone, too.
func (j *journal) order(text []byte, alone bool) (wait func() error) {
	done := make(chan error, 1)
	say := func(err error) { done <- err }
	j.mu.Lock()
	b := j.next
	b.text = append(b.text, text...)
	if alone {
		b.urgent, b.waiting = true, append(b.waiting, say)
	} else {
		b.written = append(b.written, say)
	}
	j.mu.Unlock()
	poke(j.wake)
	return func() error {
		select {
		case err := <-done:
			return err
		case <-j.stopped:
			return fmt.Errorf("write lease log: the server has ended: %w", errdefs.ErrUnavailable)
		}
	}
}

// poke wakes whoever waits for c, or will.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then what still waits.
func (j *journal) run(ctx context.Context) (err error) {
	var group errgroup.Group
	defer close(j.stopped)
	defer func() { err = errors.Join(err, j.file.Close()) }()
	defer func() {
		// A compaction under way may get the name or not: both logs have all.
		w := j.work
		if w == nil {
			return
		}
		close(w.again)
		err = errors.Join(err, group.Wait())
		if w.file != nil {
			err = errors.Join(err, w.file.Close())
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	spare := &batch{}
	for {
		j.compactIfDue(&group, timer)
		var event chan error
		if j.work != nil {
			event = j.work.events
		}
		select {
		case <-j.wake:
		case <-timer.C:
			continue
		case err := <-event:
			if err := j.advance(err); err != nil {
				return err
			}
			continue
		case <-ctx.Done():
			_, err := j.flush(ctx, spare)
			return err
		}
		if spare, err = j.flush(ctx, spare); err != nil {
			return err
		}
	}
}

// flush writes the batch that waits, and returns it for reuse.
func (j *journal) flush(ctx context.Context, spare *batch) (*batch, error) {
	spare.text, spare.replies, spare.written, spare.waiting = spare.text[:0], spare.replies[:0], nil, nil
	spare.garbage, spare.urgent = 0, false
	j.mu.Lock()
	b := j.next
	j.next = spare
	j.mu.Unlock()
	poke(j.room)
	if len(b.text) > 0 {
		if err := j.persist(ctx, b); err != nil {
			b.fail(err)
			return b, err
		}
	}
	for _, done := range b.written {
		done(nil)
	}
	j.garbage += b.garbage
	j.stale, j.urgent = j.stale || b.garbage > 0, j.urgent || b.urgent
	j.waiting = append(j.waiting, b.waiting...)
	j.sent(b.replies)
	return b, nil
}

// fullPause is how often a full disk is tried again.
const fullPause = time.Second

// persist puts a batch on disk, once there is room. Until then whoever waits is told so, and
// no client is answered whose lease is not there.
func (j *journal) persist(ctx context.Context, b *batch) error {
	for full := false; ; full = true {
		err := j.write(b.text)
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			if full && err == nil {
				j.full(nil)
			}
			return err
		}
		j.full(err)
		b.fail(err)
		for _, r := range b.replies {
			r.b = r.b[:0] // it would come too late
		}
		j.mu.Lock()
		next := batch{written: j.next.written, waiting: j.next.waiting}
		j.next.written, j.next.waiting = nil, nil
		j.mu.Unlock()
		next.fail(err)
		if !sleep(ctx, fullPause) {
			return err
		}
	}
}

// fail tells whoever waits.
func (b *batch) fail(err error) {
	for _, done := range append(b.written, b.waiting...) {
		done(err)
	}
	b.written, b.waiting = nil, nil
}

// write puts text on disk, in the new log too if there will be one.
func (j *journal) write(text []byte) error {
	err := appendTo(j.file, &j.size, text)
	if err == nil && j.work != nil && j.work.both {
		err = j.work.write(text)
	}
	if err != nil {
		return fmt.Errorf("write lease log %s: %w", j.path, err)
	}
	if w := j.work; w != nil && !w.both {
		w.tail = append(w.tail, text...)
	}
	return nil
}

func (w *compaction) write(text []byte) error { return appendTo(w.file, &w.size, text) }

// appendTo has all of a text at the end of a file, on disk, or nothing of it.
func appendTo(f *os.File, size *int64, text []byte) error {
	_, err := f.Write(text)
	if err == nil {
		err = unix.Fdatasync(int(f.Fd()))
	}
	if err != nil {
		if cut := f.Truncate(*size); cut != nil {
			return fmt.Errorf("%v, and %w", err, cut)
		}
		return err
	}
	*size += int64(len(text))
	return nil
}

// compactIfDue begins a compaction, or sets the timer for when it may.
func (j *journal) compactIfDue(group *errgroup.Group, timer *time.Timer) {
	large := j.garbage > 3*(j.size-j.garbage)+slack
	if j.work != nil || !large && !j.stale && !j.urgent {
		return
	}
	gap := max(pause, share*j.took)
	switch {
	case j.failed:
		gap = pause
	case j.urgent || large:
		gap = j.took // half of the time, if one release follows another
	}
	if wait := gap - time.Since(j.last); wait > 0 {
		timer.Reset(wait)
		return
	}
	w := &compaction{began: time.Now(), waiting: j.waiting, events: make(chan error, 1), again: make(chan struct{})}
	j.work, j.waiting, j.stale, j.urgent, j.garbage = w, nil, false, false, 0
	group.Go(func() error {
		f, size, err := j.rewrite()
		w.file, w.size = f, size
		w.events <- err
		if _, more := <-w.again; more && err == nil {
			w.events <- j.rename()
		}
		return nil
	})
}

// advance goes on with a compaction after one of its two long steps.
func (j *journal) advance(err error) error {
	w := j.work
	switch {
	case err != nil:
		close(w.again)
		j.finish(fmt.Errorf("compact lease log: %w", err))
		if w.both {
			// The name may be either log's: only a restart can tell.
			return fmt.Errorf("compact lease log %s: %w", j.path, err)
		}
		return nil
	case !w.both:
		w.both = true
		if len(w.tail) > 0 {
			if err := w.write(w.tail); err != nil {
				w.both = false
				return j.advance(err)
			}
		}
		w.tail = nil
		w.again <- struct{}{}
		return nil
	}
	close(w.again)
	old := j.file
	j.file, j.size = w.file, w.size
	j.finish(nil)
	if err := old.Close(); err != nil {
		return fmt.Errorf("compact lease log %s: %w", j.path, err)
	}
	return nil
}

func (j *journal) finish(err error) {
	w := j.work
	j.work, j.last, j.took, j.failed = nil, time.Now(), time.Since(w.began), err != nil
	if err != nil {
		j.warn(err)
		j.stale = true
		if w.file != nil {
			w.file.Close()
		}
	}
	for _, done := range w.waiting {
		done(err)
	}
}

// rewrite writes a new log beside the old one.
func (j *journal) rewrite() (*os.File, int64, error) {
	f, err := os.OpenFile(j.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, 0, err
	}
	err = j.content(&gentle{File: f})
	if err = errors.Join(err, f.Sync()); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, size, nil
}

// gentle writes to the disk as it goes, and not all at the end.
type gentle struct {
	*os.File
	unwritten int
}

func (g *gentle) Write(b []byte) (int, error) {
	n, err := g.File.Write(b)
	if g.unwritten += n; err == nil && g.unwritten >= piece {
		g.unwritten, err = 0, unix.Fdatasync(int(g.Fd()))
	}
	return n, err
}

// rename gives the new log the name.
func (j *journal) rename() error {
	if err := os.Rename(j.path+".new", j.path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(j.path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
