package run

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// Notify tells systemd what is so of this service (sd_notify(3)): READY=1, STATUS=….
// Where there is no systemd nobody is told, which is no error.
func Notify(states ...string) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(strings.Join(states, "\n"))); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// watchdogTime is how soon systemd kills this process if it does not hear of it; 0:
// never.
func watchdogTime() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 {
		return 0
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0 // it was the parent's
	}
	return time.Duration(usec) * time.Microsecond
}

// Watchdog is the task that gives systemd a sign of life twice in the time that it
// waits for one, each time only if alive has looked and found no error.
func Watchdog(log *slog.Logger, alive func(context.Context) error) Task {
	return Func("watchdog", func(ctx context.Context, ready func()) error {
		ready()
		each := watchdogTime() / 2
		if each == 0 {
			<-ctx.Done()
			return nil
		}
		for tick := time.NewTicker(each); ; {
			if err := sign(ctx, each, alive); err != nil && ctx.Err() == nil {
				log.Warn("systemd gets no sign of life", "err", err)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				tick.Stop()
				return nil
			}
		}
	})
}

func sign(ctx context.Context, most time.Duration, alive func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	if err := alive(ctx); err != nil {
		return err
	}
	return Notify("WATCHDOG=1")
}
