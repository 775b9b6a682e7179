package dhcp

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// Who watches sees each state that a lease stays in, also its end, which no message
// brings about.
func TestWatch(t *testing.T) {
	segment(t)
	c := config(t)
	c.MinLease, c.DefaultLease = time.Second, 2*time.Second
	s, _ := start(t, c)
	if got := ack(t, s, 1); got != "192.168.10.26" {
		t.Fatal(got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	seen := make(chan string, 100)
	group.Go(func() {
		err := s.Watch(ctx, func(l Lease, initial bool) error {
			text := l.IP.String() + " " + l.State
			if initial {
				text += " initial"
			}
			seen <- text
			return nil
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the watch ended with %v", err)
		}
	})
	sees := func(want string) {
		t.Helper()
		select {
		case got := <-seen:
			if got != want {
				t.Errorf("seen %q, not %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%q is not seen", want)
		}
	}
	sees("192.168.10.26 active initial")
	sees("192.168.10.26 expired")
	ack(t, s, 2)
	sees("192.168.10.27 active")
	if err := s.Release(a("192.168.10.27")); err != nil {
		t.Fatal(err)
	}
	sees("192.168.10.27 released")
	if _, err := s.Reserve(Reservation{MAC: mac(3), IP: a("192.168.10.50")}); err != nil {
		t.Fatal(err)
	}
	sees("192.168.10.50 reserved")
	if err := s.Unreserve(Reservation{IP: a("192.168.10.50")}); err != nil {
		t.Fatal(err)
	}
	sees("192.168.10.50 released")
	stopped := errors.New("enough")
	if err := s.Watch(t.Context(), func(Lease, bool) error { return stopped }); !errors.Is(err, stopped) {
		t.Errorf("a watch that can't tell ended with %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.watches) != 1 {
		t.Errorf("%d watches are left", len(s.watches))
	}
}
