package dhcp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/ipv4"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	if err := s.run(ctx); err != nil {
		return s.fail(err)
	}
	return nil
}

func (s *Server) run(ctx context.Context) error {
	iface, err := net.InterfaceByName(s.c.Interface)
	if err != nil {
		return fmt.Errorf("serve DHCP on %s: %w", s.c.Interface, err)
	}
	lock, err := Lock(ctx, s.c.LeaseFile)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := s.load(); err != nil {
		return err
	}
	j, err := openJournal(s.c.LeaseFile, s.clean, s.content)
	if err != nil {
		return err
	}
	if err := s.export(); err != nil {
		return err
	}
	wire, err := openSockets(ctx, iface, s.own)
	if err != nil {
		return fmt.Errorf("serve DHCP on %s: %w", s.c.Interface, err)
	}
	defer wire.Close()
	synced := newSender(wire)
	j.sent = func(replies []*reply) { s.send(synced, replies) }
	j.warn = func(err error) { s.c.Log.Warn("compact lease log", "err", err) }
	j.full = func(err error) {
		s.mu.Lock()
		s.failure, s.serving = err, err == nil
		if err != nil {
			s.note(s.c.Log.Error, "nobody is given an address", "err", err)
		} else {
			s.note(s.c.Log.Info, "there is room for the lease log again")
		}
		s.unlock()
	}
	s.mu.Lock()
	s.log = j
	count := len(s.leases)
	s.mu.Unlock()
	where := fmt.Sprintf("LPF/%s/%s/%s", s.c.Interface, iface.HardwareAddr, s.pool(s.own).prefix)
	s.c.Log.Info(fmt.Sprintf("Wrote %d leases to leases file.", count))
	s.c.Log.Info("Listening on " + where)
	s.c.Log.Info("Sending on   " + where)
	s.c.Log.Info("Sending on   Socket/fallback/fallback-net")
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return j.run(ctx) })
	group.Go(func() error { return s.listenARP(ctx, wire) })
	group.Go(func() error { return s.probe(ctx, wire) })
	group.Go(func() error { return s.seekForeign(ctx, wire) })
	group.Go(func() error {
		if !sleep(ctx, s.c.Settle) {
			return nil
		}
		s.c.Log.Info("Server starting service.")
		s.mu.Lock()
		s.serving = true
		s.mu.Unlock()
		close(s.ready)
		return s.receive(ctx, wire, j)
	})
	return group.Wait()
}

// Lock takes a lease log for whoever calls, before it is read: of two servers the
// second would write it anew while the first acknowledges into what was it. It waits
// for a while if a server has it.
func Lock(ctx context.Context, leaseFile string) (io.Closer, error) {
	path := leaseFile + ".lock"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("lock lease log: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock lease log: %w", err)
	}
	err = run.Patiently(ctx, unix.EWOULDBLOCK, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another server has it: %w", errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("lock lease log %s: %w", leaseFile, err)
	}
	return f, nil
}

// sleep waits; false says that ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// batchSize is how many messages are read and answered with one system call.
const batchSize = 64

// replyPool keeps replies for reuse.
var replyPool = sync.Pool{New: func() any { return new(reply) }}

func (s *Server) receive(ctx context.Context, wire *sockets, j *journal) error {
	stop := context.AfterFunc(ctx, func() { wire.server.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	in, out := ipv4.NewPacketConn(wire.server), newSender(wire)
	messages := make([]ipv4.Message, batchSize)
	for i := range messages {
		messages[i].Buffers = [][]byte{make([]byte, 4096)}
	}
	var text []byte
	now := make([]*reply, 0, batchSize) // what needs no write to the log
	for {
		n, err := in.ReadBatch(messages, 0)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.ENETDOWN) {
			continue // the interface is down for a moment
		}
		if err != nil {
			return fmt.Errorf("receive DHCP: %w", err)
		}
		now = now[:0]
		asked := time.Now()
		for i := range messages[:n] {
			m, err := parse(messages[i].Buffers[0][:messages[i].N])
			if err != nil {
				s.mu.Lock()
				s.count.Malformed++
				s.mu.Unlock()
				continue
			}
			r := replyPool.Get().(*reply)
			r.asked = asked
			_, text = s.handle(&m, r, text[:0])
			switch {
			case len(text) > 0: // r is the journal's
				j.pace()
			case len(r.b) > 0:
				now = append(now, r)
			default:
				replyPool.Put(r)
			}
		}
		s.send(out, now)
	}
}

// send sends replies, and takes them back.
func (s *Server) send(wire *sender, replies []*reply) {
	if err := wire.send(replies); err != nil {
		s.mu.Lock()
		s.note(s.c.Log.Warn, "send answer", "err", err)
		s.unlock()
	}
	sent := time.Now()
	for _, r := range replies {
		if len(r.b) > 0 {
			s.latency.note(sent.Sub(r.asked))
		}
		replyPool.Put(r)
	}
}

// chunk is how many leases a compaction looks at while messages wait.
const chunk = 256

// content writes the whole log as it should be. The table changes meanwhile: the
// log has those changes again after what is written here.
func (s *Server) content(w io.Writer) error {
	b := bufio.NewWriterSize(w, 64<<10)
	b.WriteString(header)
	var text []byte
	s.mu.Lock()
	ips := make([]addr4, 0, len(s.leases))
	for ip := range s.leases {
		ips = append(ips, ip)
	}
	kept := make([]addr4, 0, len(s.booked.byIP))
	for ip, r := range s.booked.byIP {
		if !r.fixed {
			kept = append(kept, ip)
		}
	}
	slices.Sort(kept)
	for _, ip := range kept {
		text = formatReservation(text, *s.booked.byIP[ip])
	}
	s.mu.Unlock()
	b.Write(text)
	slices.Sort(ips)
	for part := range slices.Chunk(ips, chunk) {
		text = text[:0]
		s.mu.Lock()
		for _, ip := range part {
			if r := s.leases[ip]; s.lasting(r) {
				text = formatRecord(text, r)
			}
		}
		s.mu.Unlock()
		b.Write(text)
	}
	return b.Flush() // which has the error of every Write
}

// lasting says whether a record is worth a line: not offers, which a client
// repeats, nor what is put aside no longer.
func (s *Server) lasting(r *record) bool {
	return r.state == stateActive || r.state == stateDeclined && !s.ended(r) || r.state == stateReleased && r.ends > 0
}
