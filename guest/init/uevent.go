package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// awaitDevice waits until found says so, looking again whenever the kernel
// reports a device. found returns false while the device is not there.
func awaitDevice(ctx context.Context, found func() bool) error {
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
	for !found() {
		if _, err := f.Read(buf); err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		// Any other error (a full buffer) means that something was reported, too.
	}
	return nil
}
