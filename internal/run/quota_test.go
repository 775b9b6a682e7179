package run_test

import (
	"errors"
	"io"
	"net"
	"testing"

	"ingot/internal/run"
)

func TestQuota(t *testing.T) {
	q := run.NewQuota(3, 2)
	from := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	take := func(ip string, want bool) func() {
		t.Helper()
		give, ok := q.Take(from(ip))
		if ok != want {
			t.Errorf("%s: %v", ip, ok)
		}
		return give
	}
	first := take("10.0.0.1", true)
	take("::ffff:10.0.0.1", true)
	take("10.0.0.1", false)
	second := take("10.0.0.2", true)
	take("10.0.0.3", false)
	second()
	second() // counts once
	take("10.0.0.3", true)
	take("10.0.0.4", false)
	first()
	take("10.0.0.1", true)
	q = run.NewQuota(9, 1)
	for _, ok := range []bool{true, false} {
		if _, got := q.Take(&net.UnixAddr{Net: "unix", Name: "@"}); got != ok {
			t.Errorf("by a Unix socket: %v, want %v", got, ok)
		}
	}
}

// One client can't keep another out.
func TestLimit(t *testing.T) {
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := run.Limit(plain, run.NewQuota(8, 2))
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	t.Cleanup(func() {
		l.Close()
		for range accepted {
		}
	})
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial("127.0.0.2")
	one := <-accepted
	dial("127.0.0.2")
	<-accepted
	if _, err := dial("127.0.0.2").Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the third connection of a client: %v", err)
	}
	dial("127.0.0.3")
	<-accepted
	one.Close()
	dial("127.0.0.2")
	<-accepted
}
