package wire

import (
	"net/netip"
	"testing"
	"time"
)

// TestNews: a client is told of once a minute, and strangers do not use up the memory.
func TestNews(t *testing.T) {
	l := &listening{said: map[netip.Addr]time.Time{}}
	one, now := netip.MustParseAddr("10.0.0.1"), time.Now()
	for _, c := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {time.Second, false}, {59 * time.Second, false}, {time.Minute, true}, {time.Minute + time.Second, false}} {
		if got := l.news(one, now.Add(c.after)); got != c.want {
			t.Errorf("after %v: %v", c.after, got)
		}
	}
	now = now.Add(time.Hour)
	told := 0
	for a := netip.MustParseAddr("10.1.0.0"); a != netip.MustParseAddr("10.1.16.0"); a = a.Next() {
		if l.news(a, now) {
			told++
		}
	}
	if told != sayMost || len(l.said) != sayMost {
		t.Errorf("%d are told of, %d remembered", told, len(l.said))
	}
	if !l.news(one, now.Add(time.Minute)) {
		t.Error("a minute later there is no room")
	}
}
