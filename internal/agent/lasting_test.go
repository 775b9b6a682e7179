package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// taken is one end of a lasting command: what has come of it, over all conversations.
type taken struct {
	mu    sync.Mutex
	bytes [2][]byte
}

// on is one output of a conversation, which confirms what it has.
func (k *taken) on(i int, session func() *Session) io.Writer {
	return writerFunc(func(b []byte) (int, error) {
		k.mu.Lock()
		k.bytes[i] = append(k.bytes[i], b...)
		out, errOut := uint64(len(k.bytes[0])), uint64(len(k.bytes[1]))
		k.mu.Unlock()
		session().Confirm(out, errOut)
		return len(b), nil
	})
}

func (k *taken) at() Resumption {
	k.mu.Lock()
	defer k.mu.Unlock()
	return Resumption{Stdout: uint64(len(k.bytes[0])), Stderr: uint64(len(k.bytes[1]))}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// talk runs a part of a lasting command in one conversation, until the command's end
// or that of the conversation.
func (k *taken) talk(t *testing.T, c *Client, cmd Command, fresh bool, input []byte) (int, error) {
	t.Helper()
	var session *Session
	there := make(chan struct{})
	get := func() *Session { <-there; return session }
	in, typing := io.Pipe()
	var err error
	if fresh {
		session, err = c.Exec(context10(t), cmd, in, k.on(0, get), k.on(1, get))
	} else {
		session, err = c.Resume(context10(t), cmd, k.at(), in, k.on(0, get), k.on(1, get))
	}
	close(there)
	if err != nil {
		return -1, err
	}
	var writing sync.WaitGroup
	defer writing.Wait()
	defer in.Close()
	if n, err := session.Joined(context10(t)); err == nil {
		writing.Go(func() { typing.Write(input[min(n, uint64(len(input))):]); typing.Close() })
	}
	code, err := session.Wait()
	if err == nil {
		session.Release()
		c.Info(context10(t)) // which the guest answers after it
	}
	return code, err
}

// A lasting command goes through conversations that are cut anywhere: what it is given
// and what it writes comes once, in order, and so does its end.
func TestLastingThroughCuts(t *testing.T) {
	g := newGuest(t)
	input := make([]byte, 8<<20)
	rand.Read(input)
	cmd := sh("tee /dev/stderr; exit 9")
	cmd.ID = "one"
	random := mathrand.New(mathrand.NewPCG(1, 2))
	k := &taken{}
	cuts := 0
	for ; ; cuts++ {
		host, end := socketpair(t)
		g.port.attach(end)
		left := random.IntN(2 << 20)
		cut := &cutting{Conn: host, left: left}
		if cuts > 200 {
			cut.left = 1 << 30
		}
		c := NewClient(cut)
		code, err := k.talk(t, c, cmd, cuts == 0 || k.at() == Resumption{}, input)
		c.Close()
		if err == nil {
			if code != 9 {
				t.Errorf("code %d", code)
			}
			break
		}
		if errors.Is(err, ErrUnknown) || !errors.Is(err, ErrClosed) && !errors.Is(err, ErrReset) {
			t.Fatalf("after %d cuts: %v", cuts, err)
		}
	}
	if !bytes.Equal(k.bytes[0], input) || !bytes.Equal(k.bytes[1], input) {
		t.Errorf("output has %d and %d bytes, want twice the input's %d", len(k.bytes[0]), len(k.bytes[1]), len(input))
	}
	if cuts < 5 {
		t.Errorf("only %d cuts", cuts)
	}
	t.Log(cuts, "cuts")
	if _, err := k.talk(t, g.connect(t), cmd, false, input); err != nil && !errors.Is(err, ErrUnknown) { // the last word may have been cut, too
		t.Error(err)
	}
	g.expectNone(t)
}

// expectNone waits until the server has forgotten all commands.
func (g *guest) expectNone(t *testing.T) {
	t.Helper()
	n := 0
	for range 1000 {
		g.mu.Lock()
		n = len(g.execs) + len(g.streams)
		g.mu.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("the server still has %d commands", n)
}

// cutting is a connection that ends after so many bytes, in either direction.
type cutting struct {
	net.Conn
	mu   sync.Mutex
	left int
}

func (c *cutting) spend(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n = min(n, c.left)
	c.left -= n
	if c.left == 0 {
		c.Conn.Close()
	}
	return n
}

func (c *cutting) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if m := c.spend(n); m < n {
		return m, io.EOF
	}
	return n, err
}

func (c *cutting) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.spend(n)
	return n, err
}

// What ends while no host is there tells so to the next one.
func TestLastingEndsAlone(t *testing.T) {
	g := newGuest(t)
	c := g.connect(t)
	cmd := sh("read x; echo got $x; exit 4")
	cmd.ID = "alone"
	k := &taken{}
	in, typing := io.Pipe()
	x, err := c.Exec(context10(t), cmd, in, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Joined(context10(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Exec(context10(t), sh("true"), nil, nil, nil); err != nil { // what is typed is there before the host goes
		t.Fatal(err)
	}
	typing.Write([]byte("it\n"))
	for range 1000 {
		g.mu.Lock()
		ended := false
		for x := range g.execs {
			ended = ended || x.id != "" && x.hasEnded()
		}
		g.mu.Unlock()
		if ended {
			break
		}
		time.Sleep(time.Millisecond)
	}
	c.Close()
	c = g.connect(t)
	if code, err := k.talk(t, c, cmd, false, nil); code != 4 || err != nil || string(k.bytes[0]) != "got it\n" {
		t.Errorf("code %d, %v, output %q", code, err, k.bytes[0])
	}
	g.expectNone(t)
	// Neither is it there any more, nor does it run again.
	for _, fresh := range []bool{false, true} {
		if _, err := k.talk(t, c, cmd, fresh, nil); !errors.Is(err, ErrUnknown) {
			t.Errorf("once more (fresh: %v): %v", fresh, err)
		}
	}
}

// A client that comes again has its command, and the one that had it has not.
func TestLastingTakenUp(t *testing.T) {
	g := newGuest(t)
	c := g.connect(t)
	cmd := sh("echo one; read x; echo two")
	cmd.ID = "twice"
	k := &taken{}
	first := &lines{}
	x, err := c.Exec(context10(t), cmd, zeroes(t), first, nil)
	if err != nil {
		t.Fatal(err)
	}
	first.wait(t, "one\n")
	if code, err := k.talk(t, c, cmd, true, []byte("\n")); code != 0 || err != nil || string(k.bytes[0]) != "one\ntwo\n" {
		t.Errorf("code %d, %v, output %q", code, err, k.bytes[0])
	}
	var refused *Error
	if _, err := x.Wait(); !errors.As(err, &refused) {
		t.Errorf("the first: %v", err)
	}
}

// Who takes a command up has its terminal as large as its own.
func TestLastingTerminal(t *testing.T) {
	g := newGuest(t)
	cmd := sh("stty size; read x; stty size")
	cmd.ID, cmd.TTY, cmd.Rows, cmd.Cols = "terminal", true, 24, 80
	c := g.connect(t)
	first := &lines{}
	if _, err := c.Exec(context10(t), cmd, zeroes(t), first, nil); err != nil {
		t.Fatal(err)
	}
	first.wait(t, "24 80")
	c.Close()
	cmd.Rows, cmd.Cols = 50, 132
	k := &taken{}
	code, err := k.talk(t, g.connect(t), cmd, false, []byte("\n"))
	if code != 0 || err != nil || !strings.Contains(string(k.bytes[0]), "50 132") {
		t.Errorf("code %d, %v, output %q", code, err, k.bytes[0])
	}
}

// zeroes is an input that gives nothing.
func zeroes(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}

// One that nobody takes up is hung up on; so is one that is released.
func TestLastingLeft(t *testing.T) {
	for name, leave := range map[string]func(*guest, *Client, *Session, context.CancelFunc){
		"client": func(_ *guest, _ *Client, _ *Session, cancel context.CancelFunc) { cancel() },
		"host":   func(_ *guest, c *Client, _ *Session, _ context.CancelFunc) { c.Close() },
		"others": func(g *guest, c *Client, _ *Session, _ context.CancelFunc) {
			g.mu.Lock()
			g.patience.host = time.Hour
			g.mu.Unlock()
			c.Close()
			if _, err := g.connect(t).Info(context10(t)); err != nil {
				t.Error(err)
			}
		},
		"released": func(g *guest, _ *Client, x *Session, _ context.CancelFunc) {
			g.mu.Lock()
			g.patience = patient
			g.mu.Unlock()
			x.Release()
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			g.mu.Lock()
			g.patience = patience{client: 50 * time.Millisecond, host: 50 * time.Millisecond, others: 50 * time.Millisecond}
			g.mu.Unlock()
			c := g.connect(t)
			cmd := sh("echo $$; exec sleep 60")
			cmd.ID = "left"
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			out := &lines{}
			x, err := c.Exec(ctx, cmd, nil, out, nil)
			if err != nil {
				t.Fatal(err)
			}
			out.wait(t, "\n")
			leave(g, c, x, cancel)
			waitDead(t, out.text)
			g.expectNone(t)
		})
	}
}

// A command whose output nobody confirms waits, with a window of it.
func TestLastingUnconfirmed(t *testing.T) {
	g := newGuest(t)
	c := g.connect(t)
	cmd := Command{Args: []string{"cat", "/dev/zero"}, ID: "much"}
	out := &counter{}
	x, err := c.Exec(context10(t), cmd, nil, out, nil)
	if err != nil {
		t.Fatal(err)
	}
	for out.n() < window {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond)
	if n := out.n(); n != window {
		t.Errorf("%d bytes came, want %d", n, window)
	}
	x.Confirm(100, 0)
	for out.n() < window+100 {
		time.Sleep(time.Millisecond)
	}
	x.Release()
	x.Wait()
	if n := out.n(); n > window+100 {
		t.Errorf("%d bytes came, want %d", n, window+100)
	}
}

type counter struct {
	mu    sync.Mutex
	count int
}

func (c *counter) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count += len(b)
	return len(b), nil
}

func (c *counter) n() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

// A guest of before lasting commands runs them as it can, and has none to take up.
func TestLastingUnknownToGuest(t *testing.T) {
	c := rogue(t, func(end net.Conn, session uint32) { // says no version
		in := &scanner{r: end}
		for {
			f, err := in.next()
			if err != nil {
				return
			}
			if f.kind == kindOpen {
				end.Write(appendFrame(nil, frame{session: session, stream: f.stream, kind: kindResult, payload: encode(result{Code: 3})}))
			}
		}
	})
	cmd := Command{Args: []string{"x"}, ID: "id"}
	x, err := c.Exec(context10(t), cmd, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if code, err := x.Wait(); code != 3 || err != nil || x.Lasting() {
		t.Errorf("code %d, %v, lasting: %v", code, err, x.Lasting())
	}
	if _, err := c.Resume(context10(t), cmd, Resumption{}, nil, nil, nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("resume: %v", err)
	}
}
