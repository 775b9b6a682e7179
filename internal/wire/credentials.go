package wire

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// TLS are a server's credentials that say in the log who speaks plaintext to it: such a
// client is told nothing that it understands.
func TLS(c *tls.Config, log *slog.Logger) credentials.TransportCredentials {
	return &listening{TransportCredentials: credentials.NewTLS(c), log: log, said: map[netip.Addr]time.Time{}}
}

// Once per client and time; and of no more clients than fit, which may be anybody.
const (
	sayEach = time.Minute
	sayMost = 1000
)

type listening struct {
	credentials.TransportCredentials
	log *slog.Logger

	mu   sync.Mutex // guards said
	said map[netip.Addr]time.Time
}

// Clone is asked for by clients only, of which there are none.
func (l *listening) Clone() credentials.TransportCredentials { return l }

func (l *listening) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := l.TransportCredentials.ServerHandshake(raw)
	var foreign tls.RecordHeaderError
	if errors.As(err, &foreign) {
		if at, err := netip.ParseAddrPort(raw.RemoteAddr().String()); err == nil && l.news(at.Addr().Unmap(), time.Now()) {
			l.log.Warn("a client speaks plaintext to a port that has TLS: it needs certificates, or an insecure-endpoint", "from", at.Addr().Unmap(), "endpoint", raw.LocalAddr())
		}
	}
	return c, info, err
}

// news says whether a client is to be told of, once each minute.
func (l *listening) news(from netip.Addr, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.said[from]; ok && now.Sub(last) < sayEach {
		return false
	}
	if len(l.said) >= sayMost {
		for a, last := range l.said {
			if now.Sub(last) >= sayEach {
				delete(l.said, a)
			}
		}
	}
	if len(l.said) >= sayMost {
		return false
	}
	l.said[from] = now
	return true
}
