package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listen serves one connection on the guest's loopback.
func listen(t *testing.T, serve func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		serve(conn.(*net.TCPConn))
		conn.Close()
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// TestDialIsInterrupted: signals come while a server is slow to take a connection, and it is
// there all the same.
func TestDialIsInterrupted(t *testing.T) {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := errors.Join(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(l, 0)); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(at.(*unix.SockaddrInet4).Port)
	first, err := dialLocal(port) // takes the one place in the queue
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	thread, dialled := make(chan int), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		conn, err := dialLocal(port)
		if err == nil {
			conn.Close()
		}
		dialled <- err
	}()
	tid := <-thread
	for tick := time.Tick(10 * time.Millisecond); !waits(t, tid); <-tick { // for the queue
	}
	for range 5 {
		if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-dialled:
			t.Fatalf("with no place in the queue: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	for range 2 {
		conn, _, err := unix.Accept(l)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(conn)
	}
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}

// waits says whether a thread waits for a connection.
func waits(t *testing.T, tid int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.HasPrefix(string(b), fmt.Sprint(unix.SYS_CONNECT, " "))
}

// The client's end of input is the server's, which may still say something.
func TestDialHalfClose(t *testing.T) {
	c := newGuest(t).connect(t)
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	var got bytes.Buffer
	port := listen(t, func(conn *net.TCPConn) {
		io.Copy(&got, conn) // until the end of input
		conn.Write(sent)
	})
	var out bytes.Buffer
	x, err := c.Dial(context10(t), port, bytes.NewReader(sent[:1<<20]), &out)
	if err != nil {
		t.Fatal(err)
	}
	if code, err := x.Wait(); err != nil || code != 0 {
		t.Errorf("code %d, %v", code, err)
	}
	if !bytes.Equal(got.Bytes(), sent[:1<<20]) || !bytes.Equal(out.Bytes(), sent) {
		t.Errorf("%d bytes came to the server, %d back", got.Len(), out.Len())
	}
}

// The server's end is the session's, also while the client's input is open; what had
// come before is given to the server.
func TestDialServerEnds(t *testing.T) {
	c := newGuest(t).connect(t)
	heard := make(chan string, 1)
	port := listen(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "SSH-2.0-test\r\n")
		line := make([]byte, 5)
		io.ReadFull(conn, line)
		conn.CloseWrite()
		rest, _ := io.ReadAll(conn)
		heard <- string(line) + string(rest)
	})
	in, typing := io.Pipe()
	defer typing.Close()
	var out lines
	x, err := c.Dial(context10(t), port, in, &out)
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t, "SSH-2.0-test")
	io.WriteString(typing, "hello")
	if code, err := x.Wait(); err != nil || code != 0 {
		t.Errorf("code %d, %v", code, err)
	}
	if got := <-heard; got != "hello" {
		t.Errorf("the server heard %q", got)
	}
}

// A client that goes ends the connection, whatever the server does.
func TestDialClientGoes(t *testing.T) {
	c := newGuest(t).connect(t)
	ended := make(chan error, 1)
	port := listen(t, func(conn *net.TCPConn) {
		for { // it says much, and reads nothing
			if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
				ended <- err
				return
			}
		}
	})
	ctx, leave := context.WithCancel(t.Context())
	in, typing := io.Pipe()
	defer typing.Close()
	var out lines
	x, err := c.Dial(ctx, port, in, &out)
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t, "\x00")
	leave()
	x.Wait()
	<-ended
}

// Where nobody listens, that is said; and nothing but a port is dialled.
func TestDialNobody(t *testing.T) {
	c := newGuest(t).connect(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	x, err := c.Dial(context10(t), port, strings.NewReader(""), nil)
	if err != nil {
		t.Fatal(err)
	}
	var refused *Error
	if _, err := x.Wait(); !errors.As(err, &refused) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error %v", err)
	}
	for _, r := range []request{
		{Op: "dial"}, {Op: "dial", Command: &Command{Args: []string{"id"}}}, {Op: "exec", Command: &Command{Args: []string{"id"}, Port: 22}},
	} {
		if _, err := c.ask(context10(t), r); !errors.As(err, &refused) {
			t.Errorf("%v: %v", r, err)
		}
	}
}
