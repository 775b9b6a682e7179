package agent

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// output is what a command has written and nobody has confirmed: at most a window,
// so that the command waits for who reads it.
type output struct {
	start uint64 // what was confirmed, in bytes
	buf   []byte // what comes after that
	ended bool
}

// has says whether all from byte n on is there.
func (o *output) has(n uint64) bool { return n >= o.start && n-o.start <= uint64(len(o.buf)) }

// confirm forgets the next n bytes.
func (o *output) confirm(n uint64) {
	n = min(n, uint64(len(o.buf)))
	o.start += n
	o.buf = o.buf[n:]
	if len(o.buf) == 0 {
		o.buf = nil
	}
}

// write keeps b and sends it. It waits for room, and reports false once nobody wants
// it any more.
func (x *execution) write(i int, b []byte) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(b) > 0 {
		for len(x.out[i].buf) == window && !x.canceled {
			x.room.Wait()
		}
		if x.canceled {
			return false
		}
		n := min(window-len(x.out[i].buf), len(b))
		x.out[i].buf = append(x.out[i].buf, b[:n]...)
		x.send(kindData, uint8(stdout+i), b[:n])
		b = b[n:]
	}
	return true
}

// drain sends the command's output. What nobody wants is read all the same: the
// process of a guest does not stand still for want of a listener. After the command's
// end, which the read deadline tells, it sends what is left in the pipe and does not
// wait for children that keep it open.
func (x *execution) drain(r *os.File, i int) {
	buf := make([]byte, maxPayload)
	read := r.Read
	for {
		n, err := read(buf)
		if !x.write(i, buf[:n]) && !x.main {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			read = func(b []byte) (int, error) { return readNow(r, b) }
		} else if err != nil {
			x.mu.Lock()
			x.out[i].ended = true
			x.send(kindEOF, uint8(stdout+i), nil)
			x.mu.Unlock()
			return
		}
	}
}

// readNow reads what is there, whatever the deadline.
func readNow(r *os.File, b []byte) (int, error) {
	raw, err := r.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) { n, err = syscall.Read(int(fd), b) }); cerr != nil {
		return 0, cerr
	}
	if n <= 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}
