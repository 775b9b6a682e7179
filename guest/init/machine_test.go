package main

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
)

func TestStopSignal(t *testing.T) {
	for name, want := range map[string]syscall.Signal{
		"": syscall.SIGTERM, "SIGQUIT": syscall.SIGQUIT, "quit": syscall.SIGQUIT, "3": syscall.SIGQUIT,
		"SIGRTMIN+3": 37, "RTMAX-1": 63, "SIGRTMIN": 34, "0": syscall.SIGTERM, "65": syscall.SIGTERM,
		"SIGRTMIN+99": syscall.SIGTERM, "SIGNOTHING": syscall.SIGTERM,
	} {
		if got := stopSignal(name); got != want {
			t.Errorf("%q: %d, want %d", name, got, want)
		}
	}
}

func TestIgnores(t *testing.T) {
	signal.Ignore(syscall.SIGUSR2)
	t.Cleanup(func() { signal.Reset(syscall.SIGUSR2) })
	if !ignores(os.Getpid(), syscall.SIGUSR2) || ignores(os.Getpid(), syscall.SIGUSR1) {
		t.Error("what is ignored and what is not is mixed up")
	}
}
