package rpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/agent"
	"ingot/internal/wire"
)

// guest is the service with one microVM, of which there is only the agent, whose
// commands are real processes, and a console.
type guest struct {
	hostService
	client *agent.Client
	view   net.Conn
}

func (g *guest) Exec(stream ingotv1.Host_ExecServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	return g.runCommand(stream, g.client, first.GetStart())
}

func (g *guest) Console(stream ingotv1.Host_ConsoleServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	return g.show(stream, g.view)
}

// serve serves a guest, and returns the other end of its console.
func serve(t *testing.T) (ingotv1.HostClient, net.Conn) {
	t.Helper()
	host, inside := net.Pipe()
	reaper := agent.NewReaper()
	server := agent.NewServer(agent.Handler{Reaper: reaper, Info: func() agent.Info { return agent.Info{} }})
	view, console := net.Pipe()
	g := &guest{client: agent.NewClient(host), view: view}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append(wire.ServerOptions("", slog.New(slog.DiscardHandler)), grpc.WaitForHandlers(true))...)
	ingotv1.RegisterHostServer(s, g)
	var all sync.WaitGroup
	all.Go(func() { server.Serve(inside) })
	all.Go(func() { s.Serve(l) })
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		s.Stop()
		g.receivers.Wait() // hangs if a handler has left one behind
		g.client.Close()
		inside.Close()
		console.Close()
		all.Wait()
		reaper.Close()
	})
	return ingotv1.NewHostClient(conn), console
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// command starts a command that gets input.
func command(t *testing.T, host ingotv1.HostClient, args ...string) ingotv1.Host_ExecClient {
	t.Helper()
	stream, err := host.Exec(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{Args: args, Stdin: true}}}); err != nil {
		t.Fatal(err)
	}
	return stream
}

func typed(b []byte) *ingotv1.ExecRequest {
	return &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Stdin{Stdin: b}}
}

// A signal reaches a command that does not read what was sent before it.
func TestSignalPassesInput(t *testing.T) {
	host, _ := serve(t)
	stream := command(t, host, "sleep", "60")
	for range 8 { // as much as a client may have on its way
		if err := stream.Send(typed(make([]byte, 32<<10))); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Signal{Signal: 15}}); err != nil {
		t.Fatal(err)
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if code, ok := r.GetPayload().(*ingotv1.ExecResponse_ExitCode); ok {
			if code.ExitCode != 128+15 {
				t.Errorf("code %d", code.ExitCode)
			}
			return
		}
	}
}

// All input arrives, of a client that does not count too, and is confirmed.
func TestInput(t *testing.T) {
	host, _ := serve(t)
	stream := command(t, host, "cat")
	data := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // 4 MiB
	var typing sync.WaitGroup
	defer typing.Wait()
	typing.Go(func() {
		for b := data; len(b) > 0; b = b[min(len(b), 50000):] {
			if err := stream.Send(typed(b[:min(len(b), 50000)])); err != nil {
				t.Error(err)
				return
			}
		}
		if err := stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_StdinEof{StdinEof: true}}); err != nil {
			t.Error(err)
		}
	})
	var out []byte
	taken := 0
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecResponse_Stdout:
			out = append(out, p.Stdout...)
		case *ingotv1.ExecResponse_StdinTaken:
			taken += int(p.StdinTaken)
		case *ingotv1.ExecResponse_ExitCode:
			if !bytes.Equal(out, data) || taken != len(data) || p.ExitCode != 0 {
				t.Errorf("%d bytes came back, %d were taken, of %d; code %d", len(out), taken, len(data), p.ExitCode)
			}
			return
		}
	}
}

// A client that goes ends its command, also while its input is not read.
func TestClientGoes(t *testing.T) {
	host, _ := serve(t)
	ctx, cancel := context.WithCancel(soon(t))
	stream, err := host.Exec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{
		Args: []string{"sh", "-c", "echo here; exec sleep 60"}, Stdin: true}}})
	var typing sync.WaitGroup
	typing.Go(func() {
		for stream.Send(typed(make([]byte, 32<<10))) == nil {
		}
	})
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.GetStdout()) > 0 {
			break
		}
	}
	cancel()
	typing.Wait() // the rest is serve's cleanup, which waits for the handler
}

// A console's end is its viewer's, who need not press a key first.
func TestConsoleEnds(t *testing.T) {
	host, console := serve(t)
	stream, err := host.Console(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Uid{Uid: "x"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := console.Write([]byte("login: ")); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || string(r.GetData()) != "login: " {
		t.Fatalf("%q, %v", r.GetData(), err)
	}
	if err := stream.Send(&ingotv1.ConsoleRequest{Payload: &ingotv1.ConsoleRequest_Data{Data: []byte("root")}}); err != nil {
		t.Fatal(err)
	}
	keys := make([]byte, 4)
	if _, err := io.ReadFull(console, keys); err != nil || string(keys) != "root" {
		t.Fatalf("%q, %v", keys, err)
	}
	console.Close() // the microVM has ended
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want the end", err)
	}
}

// lasting asks for a lasting command, again if had is not nil.
func lasting(t *testing.T, host ingotv1.HostClient, id string, had *ingotv1.ExecReceived, args ...string) (ingotv1.Host_ExecClient, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(soon(t))
	stream, err := host.Exec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	start := &ingotv1.ExecStart{Id: id, Args: args, Stdin: true, Resume: had}
	if err := stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: start}}); err != nil {
		t.Fatal(err)
	}
	return stream, cancel
}

// A lasting command goes on without its client, and comes to the one that asks next,
// until that has heard its end.
func TestLasting(t *testing.T) {
	host, _ := serve(t)
	args := []string{"sh", "-c", "while read x; do echo got $x; done; exit 3"}
	stream, leave := lasting(t, host, "one", nil, args...)
	if err := stream.Send(typed([]byte("a\nb\n"))); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for string(out) != "got a\ngot b\n" {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r.GetStdout()...)
	}
	leave()
	// Of the last line it is as if it had not come.
	stream, leave = lasting(t, host, "one", &ingotv1.ExecReceived{Stdout: 6}, args...)
	defer leave()
	out = out[:6]
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		switch p := r.GetPayload().(type) {
		case *ingotv1.ExecResponse_Joined:
			if p.Joined.GetStdin() != 4 || !p.Joined.GetLasting() {
				t.Errorf("joined: %v", p.Joined)
			}
			if err := stream.Send(typed([]byte("c\n"))); err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_StdinEof{StdinEof: true}}); err != nil {
				t.Fatal(err)
			}
			continue
		case *ingotv1.ExecResponse_Stdout:
			out = append(out, p.Stdout...)
			continue
		case *ingotv1.ExecResponse_ExitCode:
			if p.ExitCode != 3 || string(out) != "got a\ngot b\ngot c\n" {
				t.Errorf("code %d, output %q", p.ExitCode, out)
			}
		default:
			continue
		}
		break
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want the end", err)
	}
	stream, leave = lasting(t, host, "one", &ingotv1.ExecReceived{}, args...)
	defer leave()
	if r, err := stream.Recv(); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("once more: %v, %v", r, err)
	}
}
