package run_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

// TestListen gets an address once the one that has it lets go.
func TestListen(t *testing.T) {
	old, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := run.Listen(short, net.ListenConfig{}, "tcp", old.Addr().String()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is in use: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { old.Close() })
	l, err := run.Listen(t.Context(), net.ListenConfig{}, "tcp", old.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	began := time.Now()
	if _, err := run.Listen(t.Context(), net.ListenConfig{}, "tcp", "203.0.113.1:1"); !errors.Is(err, unix.EADDRNOTAVAIL) || time.Since(began) > time.Second {
		t.Errorf("an address of nobody's: %v", err)
	}
}
