package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	execv1 "ingot/api/services/microvmexec/v1alpha1"
	"ingot/api/types"
	"ingot/internal/agent"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// microVMExec is flintlock's service for commands in guests.
type microVMExec struct {
	execv1.UnimplementedMicroVMExecServer
	*hostService
}

// reach is the agent of a guest that flintlock's clients may reach, with the errors
// that they match.
func (s *hostService) reach(ctx context.Context, uid string) (*agent.Client, error) {
	v, err := s.Host.Get(uid)
	if err != nil {
		return nil, fmt.Errorf("getting microvm: %w", err)
	}
	if !v.Spec.GuestAgent {
		return nil, status.Error(codes.FailedPrecondition, "microvm was not created with guest agent access enabled")
	}
	if state := wire.State(v.Status.Phase); state != types.MicroVMStatus_CREATED {
		return nil, status.Errorf(codes.FailedPrecondition, "microvm is not ready (state: %s)", strings.ToLower(state.String()))
	}
	if v.Status.Phase == vm.Running && !v.Status.AgentReady { // it boots: another try is worth it
		return nil, fmt.Errorf("reach the guest's agent: it has not answered yet: %w", errdefs.ErrUnavailable)
	}
	return s.Host.Agent(ctx, uid)
}

// errNoStart is what a first message gets that is none.
var errNoStart = status.Error(codes.InvalidArgument, "first message must be a start message with uid and cmd set")

func (s *microVMExec) ExecCommand(stream execv1.MicroVMExec_ExecCommandServer) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return errNoStart
	}
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start.GetUid() == "" || start.GetCmd() == "" && !start.GetShell() {
		return errNoStart
	}
	if start.GetTimeoutSeconds() < 0 {
		return &vm.FieldError{Field: "timeout_seconds", Problem: fmt.Sprintf("%d is negative", start.GetTimeoutSeconds())}
	}
	client, err := s.reach(stream.Context(), start.GetUid())
	if err != nil {
		return err
	}
	return s.run(stream, client, start)
}

// termGrace is what a command has between SIGTERM and SIGKILL, and answerGrace what
// its end has, after its time, to be told.
const (
	termGrace   = 5 * time.Second
	answerGrace = 30 * time.Second
)

// run runs one command. Only one goroutine may send on a stream: the outputs take turns.
func (s *microVMExec) run(stream execv1.MicroVMExec_ExecCommandServer, client *agent.Client, start *execv1.ExecStart) error {
	var mu sync.Mutex
	send := func(r *execv1.ExecCommandResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(r)
	}
	typed := newTyping(func(int) error { return nil })
	defer typed.end(io.ErrClosedPipe)
	var stdin io.Reader
	if start.GetHasStdin() {
		stdin = typed
		s.hear(func() { typed.fill(stream) })
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	limit := time.Duration(start.GetTimeoutSeconds()) * time.Second
	if limit > 0 {
		ctx, cancel = context.WithTimeout(ctx, limit+answerGrace)
		defer cancel()
	}
	session, err := client.Exec(ctx, commandOf(start), stdin,
		writer(func(p []byte) error {
			return send(&execv1.ExecCommandResponse{Payload: &execv1.ExecCommandResponse_Stdout{Stdout: p}})
		}),
		writer(func(p []byte) error {
			return send(&execv1.ExecCommandResponse{Payload: &execv1.ExecCommandResponse_Stderr{Stderr: p}})
		}))
	if err != nil {
		return told(err)
	}
	if limit > 0 {
		for after, signal := range map[time.Duration]syscall.Signal{limit: syscall.SIGTERM, limit + termGrace: syscall.SIGKILL} {
			defer time.AfterFunc(after, func() { session.Signal(int(signal)) }).Stop()
		}
	}
	code, err := session.Wait()
	var refused *agent.Error
	if errors.As(err, &refused) {
		code = refused.Code
		err = send(&execv1.ExecCommandResponse{Payload: &execv1.ExecCommandResponse_Error{Error: refused.Text}})
	}
	if err != nil {
		return told(err)
	}
	return send(&execv1.ExecCommandResponse{Payload: &execv1.ExecCommandResponse_ExitCode{ExitCode: int32(code)}})
}

// commandOf is what a start asks for. A shell's line is cmd and args, joined.
func commandOf(start *execv1.ExecStart) agent.Command {
	args := append([]string{start.GetCmd()}, start.GetArgs()...)
	if start.GetShell() {
		args = []string{"sh", "-c", strings.Join(args, " ")}
	}
	return agent.Command{Args: args, Env: start.GetEnv(), Dir: start.GetCwd(), User: start.GetUser()}
}

// fill takes a command's input from its stream. The half-close of that is the end of
// the input too: not all clients say stdin_eof.
func (t *typing) fill(stream execv1.MicroVMExec_ExecCommandServer) {
	for {
		r, err := stream.Recv()
		if err != nil {
			t.end(err)
			return
		}
		switch p := r.GetPayload().(type) {
		case *execv1.ExecCommandRequest_Stdin:
			t.add(p.Stdin)
		case *execv1.ExecCommandRequest_StdinEof:
			if p.StdinEof {
				t.end(io.EOF)
			}
		}
	}
}
