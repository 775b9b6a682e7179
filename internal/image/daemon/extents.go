package daemon

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/fiemap.h, which x/sys does not have.
const (
	fsIocFiemap         = 0xc020660b
	fiemapExtentLast    = 0x1
	fiemapExtentShared  = 0x2000
	fiemapExtentsAtOnce = 256
)

type fiemapExtent struct {
	Logical, Physical, Length uint64
	_                         [2]uint64
	Flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	Start, Length          uint64
	Flags, Mapped, Extents uint32
	_                      uint32
	List                   [fiemapExtentsAtOnce]fiemapExtent
}

// exclusive adds up the extents of f that no other file shares.
func exclusive(f *os.File) (int64, error) {
	var total int64
	m := new(fiemap)
	for start := uint64(0); ; {
		m.Start, m.Length, m.Mapped, m.Extents = start, ^uint64(0)-start, 0, fiemapExtentsAtOnce
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(m))); errno != 0 {
			return 0, fmt.Errorf("read extents: %w", errno)
		}
		for _, e := range m.List[:m.Mapped] {
			if e.Flags&fiemapExtentShared == 0 {
				total += int64(e.Length)
			}
			if e.Flags&fiemapExtentLast != 0 {
				return total, nil
			}
			start = e.Logical + e.Length
		}
		if m.Mapped == 0 {
			return total, nil
		}
	}
}
