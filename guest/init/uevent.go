package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watchDevices gives each what the kernel says of devices, until each has enough or
// ctx ends. The first event is empty, and so is one in the place of those that were
// lost: anything may have changed.
func watchDevices(ctx context.Context, each func(event []byte) (enough bool)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("listen for devices: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevent")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listen for devices: %w", err)
	}
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 8192)
	for n := 0; !each(buf[:n]); {
		if n, err = f.Read(buf); err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		// Any other error is a full buffer: n is 0 then.
	}
	return nil
}

// awaitDevice waits until found says so, looking again whenever the kernel
// reports a device. found returns false while the device is not there.
func awaitDevice(ctx context.Context, found func() bool) error {
	return watchDevices(ctx, func([]byte) bool { return found() })
}
