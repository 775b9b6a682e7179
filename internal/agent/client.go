package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
)

// Client is a host's end of the conversation. Its methods may be called from
// several goroutines. It may be made before the guest runs: what it asks waits,
// as long as the caller's context allows, and no timer is used.
type Client struct {
	conn   io.ReadWriteCloser
	out    *outbox
	events chan Event
	done   chan struct{}
	reader sync.WaitGroup

	mu      sync.Mutex
	session uint32
	epoch   string        // of the server that welcomed us; empty until then
	version int           // that server's
	ready   chan struct{} // closed once welcomed
	last    uint32        // the newest stream
	streams map[uint32]*stream
	err     error
}

// stream is the client's side of one request.
type stream struct {
	session uint32
	stdin   *credit
	out     [2]*inbox // stdout, stderr
	lasting bool
	joined  chan uint64 // of a lasting command: what its stdin has had
	answer  chan answer
}

type answer struct {
	result result
	err    error
}

// What a client keeps of a guest's, whatever that sends.
const (
	maxQueued    = 512 // frames that the guest does not read
	maxAddresses = 64  // of an event, or of Info
)

// filler is as long as what may be missing of a frame. It is only read.
var filler [headerSize + maxPayload]byte

// NewClient starts a conversation on conn, which it owns from now on.
func NewClient(conn io.ReadWriteCloser) *Client {
	c := &Client{
		conn:    conn,
		events:  make(chan Event, 3), // as many as there are kinds
		done:    make(chan struct{}),
		ready:   make(chan struct{}),
		streams: map[uint32]*stream{},
	}
	c.out = newOutbox(conn, maxQueued, func() { conn.Close() }) // which ends read
	// The guest may stand in the middle of a frame of the host before us, and
	// would take our hello for its payload: fill that payload up.
	c.out.raw(filler[:], nil)
	c.mu.Lock()
	c.hello()
	c.mu.Unlock()
	c.reader.Go(c.read)
	return c
}

// hello starts a session; c.mu is held.
func (c *Client) hello() {
	var id [4]byte
	rand.Read(id[:])
	c.session = binary.BigEndian.Uint32(id[:]) | 1 // 0 is no session
	c.out.send(frame{session: c.session, kind: kindHello, payload: encode(greeting{Version: version})})
}

// Info asks the guest what it is.
func (c *Client) Info(ctx context.Context) (Info, error) {
	r, err := c.ask(ctx, request{Op: "info"})
	if err != nil {
		return Info{}, fmt.Errorf("ask the guest: %w", err)
	}
	if r.Info == nil {
		return Info{}, errors.New("ask the guest: answer without info")
	}
	r.Info.Addresses = few(r.Info.Addresses)
	return *r.Info, nil
}

func few(a []netip.Addr) []netip.Addr { return a[:min(len(a), maxAddresses)] }

// Shutdown asks the guest to power off, or to restart. It returns when the
// guest has agreed, not when it is done.
func (c *Client) Shutdown(ctx context.Context, reboot bool) error {
	if _, err := c.ask(ctx, request{Op: "shutdown", Reboot: reboot}); err != nil {
		return fmt.Errorf("ask the guest to shut down: %w", err)
	}
	return nil
}

// Events is what happened in the guest: first what is so now (ready, exited),
// then each change; of each kind, a reader that is slow sees the newest. It is
// closed when the conversation ends.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the conversation has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the conversation, and with it the commands that run.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.reader.Wait()
	c.out.thread.Wait()
	return err
}

// ask makes a request that has one answer, and makes it again if its session
// ends first: what is asked for so may be done twice.
func (c *Client) ask(ctx context.Context, r request) (result, error) {
	for {
		a, err := c.askOnce(ctx, r)
		if !errors.Is(err, ErrReset) {
			return a, err
		}
	}
}

func (c *Client) askOnce(ctx context.Context, r request) (result, error) {
	id, s, err := c.open(ctx, r)
	if err != nil {
		return result{}, err
	}
	select {
	case a := <-s.answer:
		return a.result, a.error()
	case <-ctx.Done():
		c.forget(id)
		return result{}, ctx.Err()
	}
}

func (a answer) error() error {
	if a.err == nil && a.result.Unknown {
		return ErrUnknown
	}
	if a.err == nil && a.result.Error != "" {
		return &Error{Code: a.result.Code, Text: a.result.Error}
	}
	return a.err
}

// open waits for the guest's welcome and sends r on a new stream.
func (c *Client) open(ctx context.Context, r request) (uint32, *stream, error) {
	payload := encode(r)
	if len(payload) > maxPayload {
		return 0, nil, fmt.Errorf("request has %d bytes, more than %d", len(payload), maxPayload)
	}
	for {
		c.mu.Lock()
		ready := c.ready
		if c.err != nil {
			defer c.mu.Unlock()
			return 0, nil, c.err
		}
		if c.epoch != "" {
			defer c.mu.Unlock()
			s := &stream{
				session: c.session, stdin: newCredit(), out: [2]*inbox{newInbox(), newInbox()}, joined: make(chan uint64, 1), answer: make(chan answer, 1),
				lasting: r.Command != nil && r.Command.ID != "" && c.version >= 2,
			}
			if s.lasting {
				s.stdin.left = 0 // until the command is joined
			} else if r.Resume != nil {
				return 0, nil, ErrUnknown
			}
			c.last++
			c.streams[c.last] = s
			c.out.send(frame{session: c.session, stream: c.last, kind: kindOpen, payload: payload})
			return c.last, s, nil
		}
		c.mu.Unlock()
		select {
		case <-ready:
		case <-c.done:
		case <-ctx.Done():
			return 0, nil, fmt.Errorf("wait for the guest's agent: %w", ctx.Err())
		}
	}
}

// tell sends a frame on a stream, if its session still is.
func (c *Client) tell(id uint32, k kind, channel uint8, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams[id] != nil {
		c.out.send(frame{session: c.session, stream: id, kind: k, channel: channel, payload: payload})
	}
}

// forget cancels a stream whose answer nobody waits for.
func (c *Client) forget(id uint32) {
	c.tell(id, kindCancel, 0, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, id)
}

func (c *Client) read() {
	in := &scanner{r: c.conn}
	for {
		f, err := in.next()
		if err != nil {
			c.end(err)
			return
		}
		c.handle(f)
	}
}

// end closes everything that waits.
func (c *Client) end(err error) {
	c.conn.Close()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
		err = ErrClosed
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.out.close(err)
	if unread := c.out.failed(); errors.Is(unread, errUnread) {
		err = fmt.Errorf("%w: %w", ErrClosed, unread)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	c.fail(err)
	close(c.events)
	close(c.done)
}

// fail ends all streams; c.mu is held.
func (c *Client) fail(err error) {
	for id, s := range c.streams {
		s.fail(err)
		delete(c.streams, id)
	}
}

func (s *stream) fail(err error) {
	s.stdin.fail(err)
	for _, in := range s.out {
		in.end(err)
	}
	s.settle(answer{err: err})
}

// settle gives the answer, unless there is one.
func (s *stream) settle(a answer) {
	select {
	case s.answer <- a:
	default:
	}
}

// handle acts on a frame. It never blocks.
func (c *Client) handle(f frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.kind == kindAnnounce {
		c.announced(f)
		return
	}
	if f.session != c.session {
		return // what is left of an earlier conversation
	}
	switch f.kind {
	case kindWelcome:
		var g greeting
		if json.Unmarshal(f.payload, &g) == nil && g.Epoch != "" && c.epoch == "" {
			c.epoch, c.version = g.Epoch, g.Version
			close(c.ready)
		}
	case kindEvent:
		c.event(f)
	case kindData, kindEOF, kindCredit, kindJoined, kindResult:
		if s := c.streams[f.stream]; s != nil {
			c.deliver(f, s)
		}
	}
}

// announced is told that the guest's agent has no session: it has started anew,
// or has taken us for gone. What it ran for us has ended.
func (c *Client) announced(f frame) {
	var g greeting
	if json.Unmarshal(f.payload, &g) != nil || g.Epoch == "" {
		return
	}
	if c.epoch != "" {
		c.epoch = ""
		c.ready = make(chan struct{})
		c.fail(ErrReset)
	}
	c.hello()
}

// event puts an event in the place of the one of its kind that was not read yet,
// so that there is always room. Nobody else writes to c.events.
func (c *Client) event(f frame) {
	var r report
	if json.Unmarshal(f.payload, &r) != nil {
		return
	}
	switch r.Event.Kind {
	case Ready, Address, Exited:
	default:
		return // of another version's
	}
	r.Event.Addresses = few(r.Event.Addresses)
	for _, e := range c.unread() {
		if e.Kind != r.Event.Kind {
			c.events <- e
		}
	}
	c.events <- r.Event
	c.out.send(frame{session: c.session, kind: kindAck, payload: encode(report{Seq: r.Seq})})
}

// unread takes the events that were not read yet.
func (c *Client) unread() (all []Event) {
	for {
		select {
		case e := <-c.events:
			all = append(all, e)
		default:
			return all
		}
	}
}

func (c *Client) deliver(f frame, s *stream) {
	switch f.kind {
	case kindCredit:
		s.stdin.grant(f.payload)
	case kindJoined:
		var j joined
		if json.Unmarshal(f.payload, &j) == nil && j.Room >= 0 {
			s.stdin.add(min(j.Room, window))
			select {
			case s.joined <- j.Stdin:
			default: // once is enough
			}
		}
	case kindResult:
		var r result
		if err := json.Unmarshal(f.payload, &r); err != nil {
			s.fail(fmt.Errorf("read the guest's answer: %w", err))
		} else {
			s.settle(answer{result: r})
			s.fail(io.EOF)
		}
		delete(c.streams, f.stream)
	case kindData, kindEOF:
		if f.channel != stdout && f.channel != stderr {
			return
		}
		in := s.out[f.channel-stdout]
		if f.kind == kindEOF {
			in.end(io.EOF)
		} else if !in.push(f.payload) {
			s.fail(errors.New("guest sent more than its window"))
			delete(c.streams, f.stream)
		}
	}
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // our own types, all of which can be marshalled
	}
	return b
}
