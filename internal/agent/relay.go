package agent

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// dialTime is how long a server in the guest may take to answer.
var dialTime = syscall.Timeval{Sec: 10}

// Dial connects to a TCP port of the guest's own (127.0.0.1), and is to a
// connection what Exec is to a command: in is sent, out gets what comes. The end of in
// is the server's end of input, what it says after that still comes; the session
// ends, with code 0, when the server has said all. An *Error means that nobody listens.
func (c *Client) Dial(ctx context.Context, port uint16, in io.Reader, out io.Writer) (*Session, error) {
	return c.exec(ctx, request{Op: "dial", Command: &Command{Port: port}, Stdin: true}, in, out, nil)
}

// relay joins a host to a port of the guest's.
func (x *execution) relay(port uint16) result {
	conn, err := dialLocal(port)
	if err != nil {
		return failure(err)
	}
	var output, input sync.WaitGroup
	said, heard := make(chan struct{}), make(chan struct{})
	output.Go(func() {
		x.drain(conn, 0)
		close(said)
	})
	input.Go(func() {
		x.feed(conn, shutdownWrite)
		close(heard)
	})
	select {
	case <-said:
		x.in.end(io.EOF) // what has come until now is still given to it
	case <-x.cancel:
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-heard:
	case <-x.cancel:
	case <-timer.C:
	}
	shutdown(conn, syscall.SHUT_RDWR) // which ends what of it still waits
	output.Wait()
	input.Wait()
	if err := conn.Close(); err != nil {
		return failure(err)
	}
	return result{}
}

// dialLocal is net.Dial for a program that has no other use for package net, which is
// as large as all the rest of it.
func dialLocal(port uint16) (*os.File, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	err = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &dialTime) // which is connect's, too
	if err == nil {
		err = connectLocal(fd, port)
	}
	if err == nil {
		err = syscall.SetNonblock(fd, true) // reads and writes wait on the poller
	}
	if err != nil {
		syscall.Close(fd)
		return nil, &Error{Code: 111, Text: fmt.Sprintf("connect to port %d of the guest: %v", port, err)}
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("port %d", port)), nil
}

// connectLocal goes on where a signal, with which Go's scheduler is free, has interrupted
// it: the kernel does not by itself where there is a time limit (signal(7)).
func connectLocal(fd int, port uint16) error {
	for began := time.Now(); ; {
		switch err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}}); err {
		case syscall.EISCONN:
			return nil
		case syscall.EINTR:
			if time.Since(began) < time.Duration(dialTime.Nano()) {
				continue
			}
			return syscall.ETIMEDOUT
		case syscall.EINPROGRESS, syscall.EALREADY, syscall.EAGAIN: // its limit
			return syscall.ETIMEDOUT
		default:
			return err
		}
	}
}

func shutdownWrite(conn *os.File) { shutdown(conn, syscall.SHUT_WR) }

func shutdown(conn *os.File, how int) {
	if raw, err := conn.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { syscall.Shutdown(int(fd), how) }) // it may have ended by itself
	}
}
