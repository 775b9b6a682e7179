package dns

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	batchSize   = 64
	mostRequest = 4096 // what is longer is no question of a resolver's
)

// batch is messages that come and go by a UDP socket in one system call (recvmmsg(2),
// sendmmsg(2)). Its memory is used again and again.
type batch struct {
	conn    syscall.RawConn
	in, out [batchSize]mmsghdr
	pieces  [2][batchSize]unix.Iovec
	names   [batchSize]unix.RawSockaddrInet6 // the longest of those that come
	bytes   [2][batchSize][]byte
	answers [batchSize][]byte

	// For the calls, which take functions.
	doReceive, doSend func(fd uintptr) bool
	n, sent, left     int
	errno             syscall.Errno
}

// mmsghdr is struct mmsghdr of 64-bit machines.
type mmsghdr struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

func newBatch(conn *net.UDPConn) (*batch, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	b := &batch{conn: raw}
	for i := range batchSize {
		b.bytes[0][i], b.bytes[1][i] = make([]byte, mostRequest), make([]byte, 0, ourSize)
		b.pieces[0][i].Base = &b.bytes[0][i][0]
		b.pieces[0][i].SetLen(mostRequest)
		for k, h := range []*unix.Msghdr{&b.in[i].header, &b.out[i].header} {
			h.Iov = &b.pieces[k][i]
			h.SetIovlen(1)
			h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		}
	}
	b.doReceive = func(fd uintptr) bool {
		b.n, b.errno = mmsg(unix.SYS_RECVMMSG, fd, b.in[:])
		return b.errno != unix.EAGAIN
	}
	b.doSend = func(fd uintptr) bool {
		b.sent, b.errno = mmsg(unix.SYS_SENDMMSG, fd, b.out[b.n-b.left:b.n])
		return b.errno != unix.EAGAIN
	}
	return b, nil
}

func mmsg(call, fd uintptr, messages []mmsghdr) (int, syscall.Errno) {
	n, _, errno := unix.Syscall6(call, fd, uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// receive waits for messages, and says how many have come.
func (b *batch) receive() (int, error) {
	for {
		for i := range b.in {
			b.in[i].header.Namelen = unix.SizeofSockaddrInet6
		}
		if err := b.conn.Read(b.doReceive); err != nil {
			return 0, err
		}
		switch b.errno {
		case 0:
			return b.n, nil
		case unix.EINTR, unix.ECONNREFUSED: // an earlier answer's
		default:
			return 0, b.errno
		}
	}
}

// message is one of those that have come, and who has sent it.
func (b *batch) message(i int) ([]byte, netip.AddrPort) {
	message := b.bytes[0][i][:b.in[i].length]
	name := &b.names[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&name.Port))[:])
	if name.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		return message, netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port)
	}
	return message, netip.AddrPortFrom(netip.AddrFrom16(name.Addr).Unmap(), port)
}

// reply is room for the answer to a message.
func (b *batch) reply(i int) []byte { return b.bytes[1][i][:0] }

// answer notes what is to be sent; nothing, if it is empty.
func (b *batch) answer(i int, answer []byte) { b.answers[i] = answer }

// send sends the answers to the first n messages, and returns the last error.
func (b *batch) send(n int) (last error) {
	b.n = 0
	for i := range n {
		answer := b.answers[i]
		if len(answer) == 0 {
			continue
		}
		h := &b.out[b.n].header
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&b.names[i])), b.in[i].header.Namelen
		h.Iov.Base = &answer[0]
		h.Iov.SetLen(len(answer))
		b.n++
	}
	for b.left = b.n; b.left > 0; {
		if err := b.conn.Write(b.doSend); err != nil {
			return err
		}
		switch b.errno {
		case 0:
			b.left -= b.sent
		case unix.EINTR:
		default:
			last = b.errno
			b.left-- // this one can't be sent
		}
	}
	return last
}
