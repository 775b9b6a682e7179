package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
)

// deafHost takes no message of a command's stream but the first.
type deafHost struct {
	ingotv1.UnimplementedHostServer
}

func (deafHost) Exec(stream ingotv1.Host_ExecServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// serveHost serves a host on a socket.
func serveHost(t *testing.T, host ingotv1.HostServer) *hostClient {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	ingotv1.RegisterHostServer(server, host)
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(l) })
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		serving.Wait()
	})
	return &hostClient{HostClient: ingotv1.NewHostClient(conn)}
}

// onHost is a command on a host.
func onHost(host *hostClient) *remote {
	return newRemote(microVM{host: host}, &ingotv1.ExecStart{Args: []string{"cat"}, Stdin: true})
}

// Whatever stands still, some signals give a command up.
func TestExecIsGivenUp(t *testing.T) {
	var all sync.WaitGroup
	defer all.Wait()
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	ctx, giveUp := context.WithCancelCause(t.Context())
	defer giveUp(nil)
	s := onHost(serveHost(t, deafHost{}))
	signals := make(chan os.Signal, mostSignals)
	all.Go(func() { s.run(ctx, io.Discard, io.Discard) })
	all.Go(func() { s.stdin(ctx, zero, nil) })
	// Until nothing more passes.
	for was := -1; len(s.typed) < cap(s.typed) || was != len(s.typed); time.Sleep(50 * time.Millisecond) {
		was = len(s.typed)
	}
	for range mostSignals {
		signals <- syscall.SIGINT
	}
	all.Go(func() { s.signals(ctx, signals, func() { giveUp(errIgnored) }) })
	select {
	case <-ctx.Done():
	case <-time.After(20 * time.Second):
		giveUp(nil)
		t.Fatal("not given up")
	}
	if !errors.Is(context.Cause(ctx), errIgnored) {
		t.Errorf("cause %v", context.Cause(ctx))
	}
}

// forgetfulHost loses a command, and then claims that its guest has had more than was
// ever typed.
type forgetfulHost struct {
	ingotv1.UnimplementedHostServer
}

func (forgetfulHost) Exec(stream ingotv1.Host_ExecServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	joined := &ingotv1.ExecJoined{Lasting: true}
	if first.GetStart().GetResume() == nil {
		stream.Send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Joined{Joined: joined}})
		return status.Error(codes.Unavailable, "the daemon ends")
	}
	joined.Stdin = 1 << 40
	stream.Send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Joined{Joined: joined}})
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (forgetfulHost) Watch(_ *ingotv1.WatchRequest, stream ingotv1.Host_WatchServer) error {
	return stream.Send(&ingotv1.WatchResponse{Microvm: &types.MicroVM{Status: &types.MicroVMStatus{Phase: "running", AgentReady: true}}})
}

// A guest that says what cannot be of its input is told so to the person.
func TestExecWithAWrongGuest(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s := onHost(serveHost(t, forgetfulHost{}))
	close(s.typed)
	if _, err := s.run(ctx, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "from byte 1099511627776 on") {
		t.Errorf("error %v", err)
	}
}

// echoHost takes input only once all that a client may send has come, and echoes it.
type echoHost struct {
	ingotv1.UnimplementedHostServer
	most atomic.Int64 // bytes that were on their way at once
}

func (h *echoHost) Exec(stream ingotv1.Host_ExecServer) error {
	var held []byte
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		held = append(held, r.GetStdin()...)
		h.most.Store(max(h.most.Load(), int64(len(held))))
		if len(held) < stdinWindow && !r.GetStdinEof() {
			continue
		}
		for b := held; len(b) > 0; b = b[min(len(b), 1000):] {
			stream.Send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_Stdout{Stdout: b[:min(len(b), 1000)]}})
		}
		stream.Send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_StdinTaken{StdinTaken: uint32(len(held))}})
		held = nil
		if r.GetStdinEof() {
			return stream.Send(&ingotv1.ExecResponse{Payload: &ingotv1.ExecResponse_ExitCode{ExitCode: 3}})
		}
	}
}

// All input goes to the guest, no more of it at once than the window.
func TestExecInput(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	host := &echoHost{}
	s := onHost(serveHost(t, host))
	data := bytes.Repeat([]byte("0123456789abcde\n"), 128<<10) // 2 MiB
	all.Go(func() { s.stdin(ctx, bytes.NewReader(data), nil) })
	var out bytes.Buffer
	code, err := s.run(ctx, &out, io.Discard)
	if err != nil || code != 3 || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("code %d, %d of %d bytes came back: %v", code, out.Len(), len(data), err)
	}
	if most := host.most.Load(); most > stdinWindow+32<<10 {
		t.Errorf("%d bytes were on their way", most)
	}
}
