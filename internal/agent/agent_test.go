package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ingot/internal/need"
)

// port is a virtio-serial port as a guest sees it: hosts come and go, a write
// waits for one, bytes of a cut frame stay behind.
type port struct {
	mu   sync.Mutex
	cond *sync.Cond
	conn net.Conn
	read net.Conn // what Read has read from, until it has said that it went
	end  bool
}

func newPort() *port {
	p := &port{}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *port) attach(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn = c
	p.cond.Broadcast()
}

func (p *port) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end = true
	if p.conn != nil {
		p.conn.Close()
	}
	p.cond.Broadcast()
}

func (p *port) host() (net.Conn, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.conn == nil && !p.end {
		p.cond.Wait()
	}
	return p.conn, !p.end
}

func (p *port) gone(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == c {
		p.conn = nil
	}
}

func (p *port) Read(b []byte) (int, error) {
	p.mu.Lock()
	went := p.read != nil && p.read != p.conn
	if went {
		p.read = nil
	}
	p.mu.Unlock()
	if went {
		return 0, ErrDetached
	}
	c, ok := p.host()
	if !ok {
		return 0, io.EOF
	}
	p.mu.Lock()
	p.read = c
	p.mu.Unlock()
	n, err := c.Read(b)
	if errors.Is(err, ErrDetached) {
		return 0, err
	}
	if err != nil {
		p.gone(c)
		if n == 0 {
			return p.Read(b)
		}
	}
	return n, nil
}

func (p *port) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		c, ok := p.host()
		if !ok {
			return done, io.ErrClosedPipe
		}
		n, err := c.Write(b[done:])
		done += n
		if err != nil {
			p.gone(c)
		}
	}
	return len(b), nil
}

// socketpair is a real one, with real buffers.
func socketpair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

type guest struct {
	*Server
	port     *port
	shutdown chan bool
}

// newGuest runs a server that starts real processes.
func newGuest(t testing.TB) *guest {
	t.Helper()
	g := &guest{port: newPort(), shutdown: make(chan bool, 1)}
	reaper := NewReaper()
	g.Server = NewServer(Handler{
		Reaper:   reaper,
		Info:     func() Info { return Info{Hostname: "guest", Kernel: "6.1"} },
		Shutdown: func(reboot bool) error { g.shutdown <- reboot; return nil },
	})
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := g.Serve(g.port); err != nil && !errors.Is(err, io.ErrClosedPipe) { // the test's end, amid a write
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		g.port.close()
		serving.Wait()
		reaper.Close()
	})
	return g
}

func (g *guest) connect(t testing.TB) *Client {
	t.Helper()
	host, end := socketpair(t)
	g.port.attach(end)
	c := NewClient(host)
	t.Cleanup(func() { c.Close() })
	return c
}

func context10(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func run(t testing.TB, c *Client, cmd Command, in io.Reader) (code int, out, errOut string, err error) {
	t.Helper()
	var o, e bytes.Buffer
	x, err := c.Exec(context10(t), cmd, in, &o, &e)
	if err != nil {
		t.Fatal(err)
	}
	code, err = x.Wait()
	return code, o.String(), e.String(), err
}

func sh(script string) Command { return Command{Args: []string{"sh", "-c", script}} }

func TestExec(t *testing.T) {
	c := newGuest(t).connect(t)
	info, err := c.Info(context10(t))
	if err != nil || info.Hostname != "guest" || info.Epoch == "" || info.Ready {
		t.Fatalf("info %+v, %v", info, err)
	}
	big := make([]byte, 3<<20)
	rand.Read(big)
	for _, tc := range []struct {
		name     string
		cmd      Command
		in       io.Reader
		code     int
		out, err string
	}{
		{name: "code", cmd: sh("exit 3"), code: 3},
		{name: "both outputs", cmd: sh("echo out; echo err >&2"), out: "out\n", err: "err\n"},
		{name: "signal", cmd: sh("kill -9 $$"), code: 137},
		{name: "input", cmd: Command{Args: []string{"cat"}}, in: strings.NewReader("hello"), out: "hello"},
		{name: "much", cmd: Command{Args: []string{"cat"}}, in: bytes.NewReader(big), out: string(big)},
		{name: "no input", cmd: Command{Args: []string{"cat"}}},
		{name: "input that nobody reads", cmd: sh("exit 4"), in: bytes.NewReader(big), code: 4},
		{name: "directory", cmd: Command{Args: []string{"pwd"}, Dir: "/usr"}, out: "/usr\n"},
		{name: "environment", cmd: Command{Args: []string{"sh", "-c", "echo $A $HOME"}, Env: map[string]string{"A": "b", "HOME": "/h"}}, out: "b /h\n"},
		{name: "a child that keeps the output open", cmd: sh("sleep 60 & echo $!"), out: "*"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, out, errOut, err := run(t, c, tc.cmd, tc.in)
			if err != nil || code != tc.code {
				t.Fatalf("code %d, %v; want %d", code, err, tc.code)
			}
			if tc.out == "*" {
				var pid int
				if _, err := fmt.Sscan(out, &pid); err != nil {
					t.Fatalf("output %q", out)
				}
				syscall.Kill(pid, syscall.SIGKILL)
				return
			}
			if out != tc.out || errOut != tc.err {
				t.Errorf("output %d bytes, error output %q; want %d bytes, %q", len(out), errOut, len(tc.out), tc.err)
			}
		})
	}
}

func TestExecErrors(t *testing.T) {
	c := newGuest(t).connect(t)
	for _, tc := range []struct {
		cmd  Command
		code int
		says string
	}{
		{Command{Args: []string{"no-such-command"}}, 127, "no-such-command"},
		{Command{Args: []string{"/etc/passwd"}}, 126, "/etc/passwd"},
		{Command{Args: []string{"true"}, User: "no-such-user"}, 126, "no-such-user"},
		{Command{Args: []string{"true"}, Dir: "/no/such/dir"}, 126, "start in /no/such/dir: no such file or directory"},
	} {
		code, _, _, err := run(t, c, tc.cmd, nil)
		var e *Error
		if !errors.As(err, &e) || code != tc.code || !strings.Contains(e.Text, tc.says) {
			t.Errorf("%v: code %d, %v; want %d, %q", tc.cmd, code, err, tc.code, tc.says)
		}
	}
}

func TestExecUser(t *testing.T) {
	need.Root(t)
	c := newGuest(t).connect(t)
	for user, want := range map[string]string{"nobody": "65534:65534", "7:8": "7:8", "": "0:0", "daemon:tty": "1:5"} {
		cmd := sh("echo $(id -u):$(id -g)")
		cmd.User = user
		if _, out, _, err := run(t, c, cmd, nil); err != nil || out != want+"\n" {
			t.Errorf("user %q: %q, %v; want %s", user, out, err, want)
		}
	}
}

func TestTerminal(t *testing.T) {
	c := newGuest(t).connect(t)
	in, typing := io.Pipe()
	seen := &lines{}
	cmd := Command{Args: []string{"sh", "-c", `stty size; while read x; do echo "got $x, $(stty size)"; done; exit 5`}, TTY: true, Rows: 24, Cols: 80}
	x, err := c.Exec(context10(t), cmd, in, seen, nil)
	if err != nil {
		t.Fatal(err)
	}
	seen.wait(t, "24 80")
	x.Resize(50, 132)
	fmt.Fprintln(typing, "one")
	seen.wait(t, "got one, 50 132")
	typing.Close()
	if code, err := x.Wait(); err != nil || code != 5 {
		t.Errorf("code %d, %v; want 5", code, err)
	}
}

// lines is an output that can be waited for.
type lines struct {
	mu   sync.Mutex
	text string
	more chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(b)
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
	return len(b), nil
}

func (l *lines) wait(t testing.TB, want string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		l.mu.Lock()
		if strings.Contains(l.text, want) {
			l.mu.Unlock()
			return
		}
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more, text := l.more, l.text
		l.mu.Unlock()
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("%q not in %q", want, text)
		}
	}
}

func TestSignalAndCancel(t *testing.T) {
	c := newGuest(t).connect(t)
	x, err := c.Exec(context10(t), Command{Args: []string{"sleep", "60"}}, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	x.Signal(int(syscall.SIGTERM))
	if code, err := x.Wait(); err != nil || code != 143 {
		t.Errorf("code %d, %v; want 143", code, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out := &lines{}
	x, err = c.Exec(ctx, sh("echo $$; exec sleep 60"), nil, out, nil)
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t, "\n")
	cancel()
	if _, err := x.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	waitDead(t, out.text)
}

// waitDead waits until the process whose id is in the text has gone.
func waitDead(t testing.TB, text string) {
	t.Helper()
	var pid int
	fmt.Sscan(text, &pid)
	for range 500 {
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %d still there", pid)
}

// A command whose reader stands still holds up nobody else.
func TestStalledStream(t *testing.T) {
	c := newGuest(t).connect(t)
	blocked, release := io.Pipe()
	defer release.Close()
	ctx, cancel := context.WithCancel(t.Context())
	x, err := c.Exec(ctx, Command{Args: []string{"yes"}}, nil, release, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocked.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	// The second one's command never reads its input.
	y, err := c.Exec(ctx, Command{Args: []string{"sleep", "60"}}, zeros{}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		code, out, _, err := run(t, c, Command{Args: []string{"head", "-c", "300000", "/dev/zero"}}, nil)
		if err != nil || code != 0 || len(out) != 300000 {
			t.Fatalf("code %d, %d bytes, %v", code, len(out), err)
		}
	}
	cancel()
	blocked.Close()
	x.Wait()
	y.Wait()
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestEvents(t *testing.T) {
	g := newGuest(t)
	g.Notify(Event{Kind: Ready})
	c := g.connect(t)
	if e := <-c.Events(); e.Kind != Ready {
		t.Errorf("event %+v, want ready", e)
	}
	g.Notify(Event{Kind: Exited, Code: 7})
	if err := g.Flush(context10(t)); err != nil {
		t.Error(err)
	}
	if e := <-c.Events(); e.Kind != Exited || e.Code != 7 {
		t.Errorf("event %+v, want exited 7", e)
	}
	if err := c.Shutdown(context10(t), true); err != nil {
		t.Error(err)
	}
	if reboot := <-g.shutdown; !reboot {
		t.Error("power-off, want reboot")
	}
	c.Close()
	if _, ok := <-c.Events(); ok {
		t.Error("an event after the end")
	}
	if _, err := c.Info(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("error %v, want closed", err)
	}
}

// A host goes at any byte of what it writes or reads; the next one is served.
func TestReconnectInMidFrame(t *testing.T) {
	g := newGuest(t)
	for cut := range 30 {
		host, end := socketpair(t)
		g.port.attach(end)
		f := appendFrame(nil, frame{session: 9, stream: 1, kind: kindData, payload: bytes.Repeat([]byte("Ing\x1a"), maxPayload/4)})
		host.Write(f[:cut*len(f)/30])
		// The next host is there before the guest sees that this one went: the same
		// socket goes on, as it may look to a guest.
		c := NewClient(host)
		out := &lines{}
		x, err := c.Exec(context10(t), sh("echo $$; cat /dev/zero"), nil, out, nil)
		if err != nil {
			t.Fatalf("cut at %d: %v", cut*len(f)/30, err)
		}
		out.wait(t, "\n")
		c.Close() // in the middle of a stream of zeros
		if _, err := x.Wait(); !errors.Is(err, ErrClosed) {
			t.Fatalf("error %v, want closed", err)
		}
		waitDead(t, out.text)
	}
}

// noise is a connection that has something else before each thing read.
type noise struct {
	net.Conn
	junk []byte
}

func (n *noise) Read(b []byte) (int, error) {
	if len(n.junk) > 0 {
		m := copy(b, n.junk)
		n.junk = n.junk[m:]
		return m, nil
	}
	return n.Conn.Read(b)
}

func TestGarbage(t *testing.T) {
	whole := appendFrame(nil, frame{session: 1, stream: 1, kind: kindData, payload: []byte("old")})
	for name, junk := range map[string][]byte{
		"zeros":                    make([]byte, 100000),
		"magics":                   bytes.Repeat(magic, 20000),
		"a frame without its head": whole[5:],
		"a frame without its tail": whole[:len(whole)-1],
		"another session's frame":  whole,
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			host, end := socketpair(t)
			g.port.attach(end)
			c := NewClient(&noise{Conn: host, junk: junk})
			defer c.Close()
			if _, err := c.Info(context10(t)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// An agent that starts anew while its host stays connected is greeted again.
func TestAgentRestart(t *testing.T) {
	host, end := socketpair(t)
	c := NewClient(host)
	defer c.Close()
	g := newGuest(t)
	g.port.attach(end)
	x, err := c.Exec(context10(t), Command{Args: []string{"sleep", "60"}}, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	before, err := c.Info(context10(t))
	if err != nil {
		t.Fatal(err)
	}
	announcement := appendFrame(nil, frame{kind: kindAnnounce, payload: encode(greeting{Version: version, Epoch: "other"})})
	if _, err := g.port.Write(announcement); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Wait(); !errors.Is(err, ErrReset) {
		t.Errorf("error %v, want reset", err)
	}
	after, err := c.Info(context10(t))
	if err != nil || after.Epoch != before.Epoch {
		t.Errorf("info %+v, %v: the one server there is should have answered", after, err)
	}
}

// Without a guest, a question waits for its context and no longer.
func TestNoGuest(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	c := NewClient(host)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Info(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestNetPipe(t *testing.T) {
	host, end := net.Pipe()
	g := newGuest(t)
	g.port.attach(end)
	c := NewClient(host)
	defer c.Close()
	if code, out, _, err := run(t, c, Command{Args: []string{"cat"}}, io.LimitReader(zeros{}, 1<<20)); code != 0 || err != nil || len(out) != 1<<20 {
		t.Errorf("code %d, %d bytes, %v", code, len(out), err)
	}
}

// rogue is a guest that answers a greeting, and then does as it likes with the
// session. It reads nothing after that unless it says so.
func rogue(t *testing.T, then func(end net.Conn, session uint32)) *Client {
	t.Helper()
	host, end := socketpair(t)
	c := NewClient(host)
	var all sync.WaitGroup
	all.Go(func() {
		in := &scanner{r: end}
		f, err := in.next()
		if err != nil {
			return
		}
		end.Write(appendFrame(nil, frame{session: f.session, kind: kindWelcome, payload: encode(greeting{Epoch: "rogue"})}))
		then(end, f.session)
	})
	t.Cleanup(func() { c.Close(); end.Close(); all.Wait() })
	return c
}

// A guest that sends without end and reads nothing loses the conversation, not
// the host's memory.
func TestFlood(t *testing.T) {
	address := Event{Kind: Address, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	for name, frames := range map[string]func(session uint32) frame{
		"announce": func(uint32) frame { return frame{kind: kindAnnounce, payload: encode(greeting{Epoch: "x"})} },
		"event": func(session uint32) frame {
			return frame{session: session, kind: kindEvent, payload: encode(report{Seq: 1, Event: address})}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := rogue(t, func(end net.Conn, session uint32) {
				flood := bytes.Repeat(appendFrame(nil, frames(session)), 100)
				for {
					if _, err := end.Write(flood); err != nil {
						return
					}
				}
			})
			select {
			case <-c.Done():
			case <-time.After(30 * time.Second):
				c.out.mu.Lock()
				defer c.out.mu.Unlock()
				t.Fatalf("the conversation goes on, with %d frames queued", len(c.out.queue))
			}
			if _, err := c.Info(t.Context()); !errors.Is(err, errUnread) || !errors.Is(err, ErrClosed) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// Of a flood of events a slow reader finds the newest of each kind.
func TestEventsAreTheNewest(t *testing.T) {
	many := make([]netip.Addr, 1000)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
	}
	acked := make(chan uint64, 1)
	c := rogue(t, func(end net.Conn, session uint32) {
		send := func(seq uint64, e Event) {
			end.Write(appendFrame(nil, frame{session: session, kind: kindEvent, payload: encode(report{Seq: seq, Event: e})}))
		}
		send(1, Event{Kind: Ready})
		for i := range 100 {
			send(uint64(i+2), Event{Kind: Address, Addresses: many[i : i+1]})
		}
		send(102, Event{Kind: "gossip"})
		send(103, Event{Kind: Address, Addresses: many})
		send(104, Event{Kind: Exited, Code: 7})
		for in := (&scanner{r: end}); ; {
			f, err := in.next()
			if err != nil {
				return
			}
			var r report
			if f.kind == kindAck && json.Unmarshal(f.payload, &r) == nil && r.Seq == 104 {
				acked <- r.Seq
				return
			}
		}
	})
	<-acked
	c.Close()
	var kinds []EventKind
	for e := range c.Events() {
		kinds = append(kinds, e.Kind)
		if e.Kind == Address && len(e.Addresses) != maxAddresses {
			t.Errorf("%d addresses", len(e.Addresses))
		}
	}
	if !slices.Equal(kinds, []EventKind{Ready, Address, Exited}) {
		t.Errorf("events %v", kinds)
	}
}

// A guest that breaks its window loses that stream, not the host's memory.
func TestWindowBroken(t *testing.T) {
	host, end := net.Pipe()
	c := NewClient(host)
	defer c.Close()
	var rogue sync.WaitGroup
	defer rogue.Wait()
	defer end.Close()
	rogue.Go(func() {
		in := &scanner{r: end}
		for {
			f, err := in.next()
			if err != nil {
				return
			}
			switch f.kind {
			case kindHello:
				end.Write(appendFrame(nil, frame{session: f.session, kind: kindWelcome, payload: encode(greeting{Epoch: "rogue"})}))
			case kindOpen:
				for range 2 * window / maxPayload {
					end.Write(appendFrame(nil, frame{session: f.session, stream: f.stream, kind: kindData, channel: stdout, payload: make([]byte, maxPayload)}))
				}
			}
		}
	})
	r, w := io.Pipe()
	x, err := c.Exec(context10(t), Command{Args: []string{"x"}}, nil, w, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Nobody reads r until the stream has failed.
	for {
		c.mu.Lock()
		n := len(c.streams)
		c.mu.Unlock()
		if n == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	rogue.Go(func() { io.Copy(io.Discard, r) })
	if _, err := x.Wait(); err == nil || !strings.Contains(err.Error(), "window") {
		t.Errorf("error %v", err)
	}
	w.Close()
}

func FuzzFrame(f *testing.F) {
	one := appendFrame(nil, frame{session: 1, stream: 2, kind: kindData, channel: 1, payload: []byte("hello")})
	f.Add(one, uint8(3))
	f.Add(append([]byte("Ing\x1a junk"), one...), uint8(1))
	f.Add(append(one[:20:20], one...), uint8(7))
	f.Fuzz(func(t *testing.T, junk []byte, chunk uint8) {
		// Whatever came before, a frame that follows enough padding is found, whole.
		want := frame{session: 77, stream: 78, kind: kindResult, channel: 2, payload: []byte("the one")}
		b := append(bytes.Clone(junk), make([]byte, headerSize+maxPayload)...)
		b = appendFrame(b, want)
		in := &scanner{r: &chunks{b, int(chunk) + 1}}
		for {
			got, err := in.next()
			if err != nil {
				t.Fatalf("not found: %v", err)
			}
			if got.session == want.session && got.stream == want.stream && bytes.Equal(got.payload, want.payload) {
				return
			}
			if !bytes.Contains(b, appendFrame(nil, got)) {
				t.Fatalf("a frame that was never sent: %+v", got)
			}
		}
	})
}

type chunks struct {
	b []byte
	n int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.b[:min(c.n, len(c.b))])
	c.b = c.b[n:]
	return n, nil
}

// A host's first bytes may be read before the kernel has heard that it
// connected: between them and the rest there seems to be none.
func TestHelloOvertakesConnection(t *testing.T) {
	g := newGuest(t)
	for range 20 {
		first := g.connect(t)
		if _, err := first.Info(context10(t)); err != nil {
			t.Fatal(err)
		}
		first.Close()
		host, end := socketpair(t)
		g.port.attach(&overtaken{Conn: end})
		second := NewClient(host)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err := second.Info(ctx)
		cancel()
		second.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
}

type overtaken struct {
	net.Conn
	read int
	said bool
}

func (o *overtaken) Read(b []byte) (int, error) {
	if o.read > headerSize+maxPayload && !o.said { // the padding, and the hello
		o.said = true
		return 0, ErrDetached
	}
	n, err := o.Conn.Read(b)
	o.read += n
	return n, err
}
