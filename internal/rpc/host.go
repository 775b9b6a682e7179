package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/agent"
	"ingot/internal/image"
	"ingot/internal/logfile"
)

// hostService is ingot.v1's Host.
type hostService struct {
	ingotv1.UnimplementedHostServer
	Config
}

func (s *hostService) Start(_ context.Context, r *ingotv1.StartRequest) (*ingotv1.StartResponse, error) {
	v, err := s.Host.Start(r.GetUid())
	if err != nil {
		return nil, err
	}
	return &ingotv1.StartResponse{Microvm: message(v)}, nil
}

func (s *hostService) Stop(ctx context.Context, r *ingotv1.StopRequest) (*ingotv1.StopResponse, error) {
	timeout := 30 * time.Second
	if r.Timeout != nil {
		timeout = r.Timeout.AsDuration()
	}
	v, err := s.Host.Stop(ctx, r.GetUid(), timeout)
	if err != nil {
		return nil, err
	}
	return &ingotv1.StopResponse{Microvm: message(v)}, nil
}

func (s *hostService) Watch(r *ingotv1.WatchRequest, stream ingotv1.Host_WatchServer) error {
	views, cancel, err := s.Host.Watch(r.GetUid())
	if err != nil {
		return err
	}
	defer cancel()
	for {
		select {
		case v, ok := <-views:
			if !ok {
				return fmt.Errorf("watch: microvm spec %s not found: %w", r.Uid, errdefs.ErrNotFound)
			}
			if err := stream.Send(&ingotv1.WatchResponse{Microvm: message(v)}); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return context.Cause(stream.Context())
		}
	}
}

// writer sends what is written as messages.
type writer func([]byte) error

func (w writer) Write(p []byte) (int, error) {
	const most = 32 << 10
	for done := 0; done < len(p); {
		n := min(most, len(p)-done)
		if err := w(p[done : done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

func (s *hostService) Logs(r *ingotv1.LogsRequest, stream ingotv1.Host_LogsServer) error {
	path, err := s.Host.LogFile(r.GetUid(), r.GetFile())
	if err != nil {
		return err
	}
	return logfile.Follow(stream.Context(), path, r.GetTailBytes(), r.GetFollow(), writer(func(p []byte) error {
		return stream.Send(&ingotv1.LogsResponse{Data: p})
	}))
}

func (s *hostService) Console(stream ingotv1.Host_ConsoleServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	view, err := s.Host.Console(stream.Context(), first.GetUid())
	if err != nil {
		return err
	}
	defer view.Close()
	var typing sync.WaitGroup
	defer typing.Wait()
	typing.Go(func() {
		defer view.Close()
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			if _, err := view.Write(r.GetData()); err != nil {
				return
			}
		}
	})
	_, err = io.Copy(writer(func(p []byte) error {
		return stream.Send(&ingotv1.ConsoleResponse{Data: p})
	}), view)
	return err
}

func (s *hostService) Exec(stream ingotv1.Host_ExecServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil || len(start.GetArgs()) == 0 && !start.GetMain() {
		return fmt.Errorf("exec: first message must be a start message with uid and args set: %w", errdefs.ErrInvalidArgument)
	}
	client, err := s.Host.Agent(start.GetUid())
	if err != nil {
		return err
	}
	return runCommand(stream, client, start)
}

// runCommand runs one command in a guest. Only one goroutine may send on a stream: the
// two outputs take turns.
func runCommand(stream ingotv1.Host_ExecServer, client *agent.Client, start *ingotv1.ExecStart) error {
	var mu sync.Mutex
	send := func(r *ingotv1.ExecResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(r)
	}
	var stdin io.Reader
	in, typed := io.Pipe()
	defer in.Close()
	if start.GetStdin() || start.GetTty() {
		stdin = in
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	session, err := client.Exec(ctx, agent.Command{
		Args: start.GetArgs(), Env: start.GetEnv(), Dir: start.GetWorkingDir(), User: start.GetUser(), TTY: start.GetTty(),
		Main: start.GetMain(), Rows: uint16(start.GetSize().GetRows()), Cols: uint16(start.GetSize().GetColumns()),
	}, stdin,
		writer(func(p []byte) error {
			return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stdout{Stdout: p}})
		}),
		writer(func(p []byte) error {
			return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stderr{Stderr: p}})
		}))
	if err != nil {
		return err
	}
	// It ends with the stream's context, which ends when this call returns.
	go receive(stream, session, typed)
	code, err := session.Wait()
	var refused *agent.Error
	if errors.As(err, &refused) { // the agent's no is told as a shell's: in words, and by its code
		code = refused.Code
		err = send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stderr{Stderr: []byte(refused.Text + "\n")}})
	}
	if err != nil {
		return err
	}
	return send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_ExitCode{ExitCode: int32(code)}})
}

// receive passes on what the client sends while the command runs.
func receive(stream ingotv1.Host_ExecServer, session *agent.Session, typed *io.PipeWriter) {
	for {
		r, err := stream.Recv()
		if err != nil {
			typed.Close()
			return
		}
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecRequest_Stdin:
			if _, err := typed.Write(p.Stdin); err != nil {
				return
			}
		case *ingotv1.ExecRequest_StdinEof:
			typed.Close()
		case *ingotv1.ExecRequest_Resize:
			session.Resize(uint16(p.Resize.GetRows()), uint16(p.Resize.GetColumns()))
		case *ingotv1.ExecRequest_Signal:
			session.Signal(int(p.Signal))
		}
	}
}

func (s *hostService) Pull(r *ingotv1.PullRequest, stream grpc.ServerStreamingServer[ingotv1.PullResponse]) error {
	// Several layers report at the same time; one goroutine sends.
	reports := make(chan image.Progress, 64)
	done := make(chan error, 1)
	go func() {
		done <- s.Images.Pull(stream.Context(), r.GetImage(), image.Policy(r.GetPolicy()), func(p image.Progress) {
			select {
			case reports <- p:
			default: // the next one says more
			}
		})
	}()
	for {
		select {
		case p := <-reports:
			if err := stream.Send(&ingotv1.PullResponse{Offset: p.Offset, Total: p.Total, Status: p.Status}); err != nil {
				return err
			}
		case err := <-done:
			return err
		}
	}
}
