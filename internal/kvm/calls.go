package kvm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The calls that every architecture has (linux/kvm.h).
const (
	getAPIVersion = 0xAE00
	createVM      = 0xAE01
)

const apiVersion = 12 // the only one since Linux 2.6.22

func call(fd int, request, argument uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, argument)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// open opens the device and makes an empty machine.
func open(path string) (device *os.File, machine int, err error) {
	device, err = os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	version, err := call(int(device.Fd()), getAPIVersion, 0)
	if err == nil && version != apiVersion {
		err = fmt.Errorf("version %d, want %d", version, apiVersion)
	}
	if err != nil {
		device.Close()
		return nil, 0, fmt.Errorf("ask for the version of its interface: %w", err)
	}
	for range 5 { // a signal may interrupt it
		if machine, err = call(int(device.Fd()), createVM, 0); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		device.Close()
		return nil, 0, fmt.Errorf("make a machine: %w", err)
	}
	return device, machine, nil
}
