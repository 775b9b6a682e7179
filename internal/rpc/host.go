package rpc

import (
	"context"
	"io"
	"sync"

	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/image"
	"ingot/internal/logfile"
	"ingot/internal/vm"
)

// hostService is ingot.v1's Host.
type hostService struct {
	ingotv1.UnimplementedHostServer
	Config
	receivers sync.WaitGroup
}

func (s *hostService) Resize(_ context.Context, r *ingotv1.ResizeRequest) (*ingotv1.ResizeResponse, error) {
	v, later, err := s.Host.Resize(r.GetUid(), r.GetVolumeId(), vm.MiB(r.GetSizeInMb()))
	if err != nil {
		return nil, err
	}
	return &ingotv1.ResizeResponse{Microvm: message(v), Later: later}, nil
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
	return s.show(stream, view)
}

// show joins a client to a console until either ends.
func (s *hostService) show(stream ingotv1.Host_ConsoleServer, view io.ReadWriteCloser) error {
	defer view.Close()
	stop := context.AfterFunc(stream.Context(), func() { view.Close() })
	defer stop()
	s.hear(func() {
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
	_, err := io.Copy(writer(func(p []byte) error {
		return stream.Send(&ingotv1.ConsoleResponse{Data: p})
	}), view)
	return err
}

// hear runs what receives from a stream while its handler works. It ends with the
// stream, which ends after the handler has returned: so the server waits for it.
func (s *hostService) hear(receive func()) { s.receivers.Go(receive) }

func (s *hostService) Pull(r *ingotv1.PullRequest, stream grpc.ServerStreamingServer[ingotv1.PullResponse]) error {
	// Several layers report at the same time; one goroutine sends.
	ctx, cancel := context.WithCancel(stream.Context())
	reports := make(chan image.Progress, 64)
	done := make(chan error, 1)
	var pull sync.WaitGroup
	defer pull.Wait()
	defer cancel()
	pull.Go(func() {
		done <- s.Images.Pull(ctx, r.GetImage(), image.Policy(r.GetPolicy()), func(p image.Progress) {
			select {
			case reports <- p:
			default: // the next one says more
			}
		})
	})
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
