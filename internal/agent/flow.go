package agent

import (
	"encoding/binary"
	"errors"
	"io"
	"sync"
)

// outbox writes frames, in order, from a goroutine that is there as long as there are
// some, so that a reader that answers never waits for its own writes. Data waits until it
// is written; everything else is small. A host cannot trust its guest to read the answers
// to what it sends: past most of them, the outbox gives up.
type outbox struct {
	w       io.Writer
	most    int    // how much may be queued; 0: as much as is asked for
	giveUp  func() // called once there is more
	mu      sync.Mutex
	queue   []outgoing
	writing bool
	err     error // why nothing more is written
	thread  sync.WaitGroup
}

type outgoing struct {
	bytes []byte
	done  chan<- error // of data
}

func newOutbox(w io.Writer, most int, giveUp func()) *outbox {
	return &outbox{w: w, most: most, giveUp: giveUp}
}

// run writes until nothing is queued.
func (o *outbox) run() {
	for {
		o.mu.Lock()
		if len(o.queue) == 0 || o.err != nil {
			o.writing = false
			o.mu.Unlock()
			return
		}
		next := o.queue[0]
		o.queue = o.queue[1:]
		if len(o.queue) == 0 {
			o.queue = nil
		}
		o.mu.Unlock()
		_, err := o.w.Write(next.bytes)
		if next.done != nil {
			next.done <- err
		}
		if err != nil {
			o.close(err)
		}
	}
}

// send queues f and returns at once.
func (o *outbox) send(f frame) { o.raw(appendFrame(nil, f), nil) }

// data queues f and waits until it is written or dropped.
func (o *outbox) data(f frame) error {
	done := make(chan error, 1)
	o.raw(appendFrame(nil, f), done)
	return <-done
}

func (o *outbox) raw(b []byte, done chan<- error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		if done != nil {
			done <- o.err
		}
		return
	}
	o.queue = append(o.queue, outgoing{b, done})
	if o.most > 0 && len(o.queue) > o.most {
		o.err = errUnread
		o.drop(o.err)
		o.giveUp()
		return
	}
	if !o.writing {
		o.writing = true
		o.thread.Go(o.run)
	}
}

var errUnread = errors.New("the guest's agent does not read what it asks for")

// purge drops what is not yet written: nobody waits for it any more.
func (o *outbox) purge() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.drop(ErrDetached)
}

func (o *outbox) drop(err error) {
	for _, q := range o.queue {
		if q.done != nil {
			q.done <- err
		}
	}
	o.queue = nil
}

// close ends writing; a Write in progress is the stream owner's to end.
func (o *outbox) close(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
	o.drop(o.err)
}

// failed is why nothing is written any more, or nil.
func (o *outbox) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// credit is how much may still be sent on a channel.
type credit struct {
	mu   sync.Mutex
	wake sync.Cond
	left int
	err  error
}

func newCredit() *credit {
	c := &credit{left: window}
	c.wake.L = &c.mu
	return c
}

// take waits for credit and takes at most limit of it.
func (c *credit) take(limit int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.left == 0 && c.err == nil {
		c.wake.Wait()
	}
	if c.err != nil {
		return 0, c.err
	}
	n := min(c.left, limit)
	c.left -= n
	return n, nil
}

// grant gives what a credit frame says, never more than the window.
func (c *credit) grant(payload []byte) {
	if len(payload) != 4 {
		return
	}
	c.add(int(min(binary.BigEndian.Uint32(payload), window)))
}

// add gives n more, which is no more than a window.
func (c *credit) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = min(window, c.left+n)
	c.wake.Broadcast()
}

func (c *credit) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	c.wake.Broadcast()
}

// inbox holds what arrived on a channel and was not read yet: at most a window.
type inbox struct {
	mu   sync.Mutex
	wake sync.Cond
	buf  []byte
	err  error // io.EOF after the channel's end
	// consumed counts what was dealt with since credit was last given for it, held
	// what was not yet, and total all that came.
	consumed, held int
	total          uint64
}

func newInbox() *inbox {
	i := &inbox{}
	i.wake.L = &i.mu
	return i
}

// push takes what arrived. It reports false if the other side broke its window.
func (i *inbox) push(b []byte) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err != nil {
		return true // nobody reads it any more
	}
	if len(i.buf)+len(b) > window {
		return false
	}
	i.buf = append(i.buf, b...)
	i.held += len(b)
	i.total += uint64(len(b))
	i.wake.Broadcast()
	return true
}

// end makes read return err once all is read; io.EOF is the good end.
func (i *inbox) end(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err == nil {
		i.err = err
	}
	i.wake.Broadcast()
}

func (i *inbox) read(p []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(i.buf) == 0 && i.err == nil {
		i.wake.Wait()
	}
	if len(i.buf) == 0 {
		return 0, i.err
	}
	n := copy(p, i.buf)
	i.buf = i.buf[n:]
	return n, nil
}

// used notes that n bytes were dealt with, and returns the payload of a credit
// frame when there is enough to be worth one.
func (i *inbox) used(n int) []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held -= n
	i.consumed += n
	if i.consumed < window/4 {
		return nil
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(i.consumed))
	i.consumed = 0
	return b
}

// rejoined starts the count of credit anew, for a sender that does not know it.
func (i *inbox) rejoined() joined {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.consumed = 0
	return joined{Stdin: i.total, Room: window - i.held}
}
