package run

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Quota counts what clients have in use at one time. It has a limit for all of
// them and one for each, so that none uses up what the others need.
type Quota struct {
	all, each int

	mu   sync.Mutex // guards all below
	used int
	by   map[netip.Addr]int
}

// NewQuota makes a quota of which nothing is used.
func NewQuota(all, each int) *Quota { return &Quota{all: all, each: each, by: map[netip.Addr]int{}} }

// Limits are what may be in use at most, in all and by one client.
func (q *Quota) Limits() (all, each int) { return q.all, q.each }

// Take says whether the client may have one more. If so, it must be given back. Those
// without an IP address, who come by a Unix socket, are one client.
func (q *Quota) Take(client net.Addr) (give func(), ok bool) {
	at, _ := netip.ParseAddrPort(client.String())
	ip := at.Addr().Unmap()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used >= q.all || q.by[ip] >= q.each {
		return nil, false
	}
	q.used++
	q.by[ip]++
	return sync.OnceFunc(func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.used--
		if q.by[ip]--; q.by[ip] == 0 {
			delete(q.by, ip)
		}
	}), true
}

// Limit holds a listener's open connections to a quota. What is more is closed at
// once. It waits a little when descriptors are used up: who accepts may not.
func Limit(l net.Listener, q *Quota) net.Listener {
	return &limited{Listener: l, q: q, closed: make(chan struct{})}
}

type limited struct {
	net.Listener
	q      *Quota
	once   sync.Once
	closed chan struct{}
}

const shortagePause = 100 * time.Millisecond

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			select {
			case <-time.After(shortagePause):
			case <-l.closed:
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if give, ok := l.q.Take(c.RemoteAddr()); ok {
			return &limitedConn{c, give}, nil
		}
		c.Close()
	}
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	give func()
}

func (c *limitedConn) Close() error {
	defer c.give()
	return c.Conn.Close()
}
