package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/agent"
)

func (s *hostService) Exec(stream ingotv1.Host_ExecServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil || len(start.GetArgs()) == 0 && !start.GetMain() {
		return fmt.Errorf("exec: first message must be a start message with uid and args set: %w", errdefs.ErrInvalidArgument)
	}
	client, err := s.Host.Agent(stream.Context(), start.GetUid())
	if err != nil {
		return err
	}
	return s.runCommand(stream, client, start)
}

// runCommand runs one command in a guest. Only one goroutine may send on a stream: the
// two outputs take turns.
func (s *hostService) runCommand(stream ingotv1.Host_ExecServer, client *agent.Client, start *ingotv1.ExecStart) error {
	var mu sync.Mutex
	send := func(r *ingotv1.ExecResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(r)
	}
	typed := newTyping(func(n int) error {
		return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_StdinTaken{StdinTaken: uint32(n)}})
	})
	defer typed.end(io.ErrClosedPipe)
	var stdin io.Reader
	if start.GetStdin() || start.GetTty() {
		stdin = typed
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	session, err := begin(ctx, client, start, stdin,
		writer(func(p []byte) error {
			return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stdout{Stdout: p}})
		}),
		writer(func(p []byte) error {
			return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stderr{Stderr: p}})
		}))
	if err != nil {
		return told(err)
	}
	left := make(chan struct{})
	s.hear(func() {
		defer close(left)
		receive(stream, session, typed)
	})
	if start.GetId() != "" {
		if err := join(ctx, session, send); err != nil {
			return err
		}
	}
	code, err := session.Wait()
	var refused *agent.Error
	if errors.As(err, &refused) { // the agent's no is told as a shell's: in words, and by its code
		code = refused.Code
		err = send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stderr{Stderr: []byte(refused.Text + "\n")}})
	}
	if err != nil {
		return told(err)
	}
	err = send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_ExitCode{ExitCode: int32(code)}})
	if err == nil && session.Lasting() {
		select { // until the client has it, and the guest may forget it
		case <-left:
		case <-time.After(lastWord):
		}
	}
	return err
}

// lastWord is how long a client may take to say that it has an exit code.
const lastWord = 5 * time.Second

// begin starts a command, or takes a lasting one up.
func begin(ctx context.Context, client *agent.Client, start *ingotv1.ExecStart, stdin io.Reader, stdout, stderr io.Writer) (*agent.Session, error) {
	cmd := agent.Command{
		ID: start.GetId(), Args: start.GetArgs(), Env: start.GetEnv(), Dir: start.GetWorkingDir(), User: start.GetUser(), TTY: start.GetTty(),
		Main: start.GetMain(), Rows: uint16(start.GetSize().GetRows()), Cols: uint16(start.GetSize().GetColumns()),
	}
	if had := start.GetResume(); had != nil {
		return client.Resume(ctx, cmd, agent.Resumption{Stdout: had.GetStdout(), Stderr: had.GetStderr()}, stdin, stdout, stderr)
	}
	return client.Exec(ctx, cmd, stdin, stdout, stderr)
}

// join tells the client that the guest has its lasting command.
func join(ctx context.Context, session *agent.Session, send func(*ingotv1.ExecResponse) error) error {
	joined := &ingotv1.ExecJoined{Lasting: session.Lasting()}
	if session.Lasting() {
		var err error
		if joined.Stdin, err = session.Joined(ctx); err != nil {
			return nil // the command's end says why
		}
	}
	return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Joined{Joined: joined}})
}

// told gives an error of the conversation the meaning that it has for a client.
func told(err error) error {
	switch {
	case errors.Is(err, agent.ErrUnknown):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case errors.Is(err, agent.ErrReset), errors.Is(err, agent.ErrClosed):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// receive passes on what the client sends while the command runs.
func receive(stream ingotv1.Host_ExecServer, session *agent.Session, typed *typing) {
	for {
		r, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) && session.Lasting() {
				session.Release()
			}
			typed.end(err)
			return
		}
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecRequest_Stdin:
			typed.add(p.Stdin)
		case *ingotv1.ExecRequest_StdinEof:
			typed.end(io.EOF)
		case *ingotv1.ExecRequest_Resize:
			session.Resize(uint16(p.Resize.GetRows()), uint16(p.Resize.GetColumns()))
		case *ingotv1.ExecRequest_Signal:
			session.Signal(int(p.Signal))
		case *ingotv1.ExecRequest_Received:
			session.Confirm(p.Received.GetStdout(), p.Received.GetStderr())
		}
	}
}

// mostTyped is how much of a client's input waits for the guest: more than a
// client that counts sends, so that what else it sends never waits behind that.
const mostTyped = 512 << 10

// typing is a command's input that the guest has not taken yet.
type typing struct {
	taken func(int) error // is told what Read has given

	mu   sync.Mutex // guards what follows
	wake sync.Cond
	buf  []byte
	err  error // after buf
}

func newTyping(taken func(int) error) *typing {
	t := &typing{taken: taken}
	t.wake.L = &t.mu
	return t
}

// add waits until there is room, or nobody reads any more.
func (t *typing) add(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.buf) >= mostTyped && t.err == nil {
		t.wake.Wait()
	}
	if t.err == nil {
		t.buf = append(t.buf, b...)
		t.wake.Broadcast()
	}
}

// end makes Read return err once all is read.
func (t *typing) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	t.wake.Broadcast()
}

func (t *typing) Read(p []byte) (int, error) {
	t.mu.Lock()
	for len(t.buf) == 0 && t.err == nil {
		t.wake.Wait()
	}
	n, err := copy(p, t.buf), t.err
	t.buf = t.buf[n:]
	t.wake.Broadcast()
	t.mu.Unlock()
	if n == 0 {
		return 0, err
	}
	return n, t.taken(n)
}
