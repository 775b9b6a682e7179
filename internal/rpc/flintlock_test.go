package rpc

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"ingot/api/services/microvm/v1alpha1"
	execv1 "ingot/api/services/microvmexec/v1alpha1"
	sshv1 "ingot/api/services/microvmsshproxy/v1alpha1"
	"ingot/internal/agent"
	"ingot/internal/host"
	"ingot/internal/wire"
)

// reached are flintlock's services with one microVM, that of type guest, whatever uid
// is asked for. The rules by which one is reached are tested with a host.
type reached struct {
	microVMExec
	sshv1.UnimplementedMicroVMSSHProxyServer
	client *agent.Client
	port   uint16
}

func (r *reached) ExecCommand(stream execv1.MicroVMExec_ExecCommandServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	return r.run(stream, r.client, first.GetStart())
}

func (r *reached) SSHProxy(stream sshv1.MicroVMSSHProxy_SSHProxyServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	return (&microVMSSHProxy{hostService: r.hostService, port: r.port}).join(stream, r.client)
}

// dial serves and dials.
func dial(t *testing.T, register func(*grpc.Server)) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append(wire.ServerOptions("", slog.New(slog.DiscardHandler)), grpc.WaitForHandlers(true))...)
	register(s)
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(l) })
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); s.Stop(); serving.Wait() })
	return conn
}

// reach serves a guest by flintlock's services.
func reach(t *testing.T, sshPort uint16) *grpc.ClientConn {
	t.Helper()
	outside, inside := net.Pipe()
	reaper := agent.NewReaper()
	server := agent.NewServer(agent.Handler{Reaper: reaper, Info: func() agent.Info { return agent.Info{} }})
	h := &hostService{}
	r := &reached{microVMExec: microVMExec{hostService: h}, client: agent.NewClient(outside), port: sshPort}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(inside) })
	t.Cleanup(func() { // after dial's
		h.receivers.Wait()
		r.client.Close()
		inside.Close()
		serving.Wait()
		reaper.Close()
	})
	return dial(t, func(s *grpc.Server) {
		execv1.RegisterMicroVMExecServer(s, r)
		sshv1.RegisterMicroVMSSHProxyServer(s, r)
	})
}

// outcome is what came of a command.
type outcome struct {
	Stdout, Stderr, Error string
	Code                  int32
}

// execute runs a command as fl does: input in pieces of 32 KiB, an end, or a half-close.
func execute(t *testing.T, conn *grpc.ClientConn, start *execv1.ExecStart, input []byte, eof bool) (o outcome) {
	t.Helper()
	stream, err := execv1.NewMicroVMExecClient(conn).ExecCommand(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() {
		stream.Send(&execv1.ExecCommandRequest{Payload: &execv1.ExecCommandRequest_Start{Start: start}})
		for b := input; len(b) > 0; b = b[min(len(b), 32<<10):] {
			stream.Send(&execv1.ExecCommandRequest{Payload: &execv1.ExecCommandRequest_Stdin{Stdin: b[:min(len(b), 32<<10)]}})
		}
		if eof {
			stream.Send(&execv1.ExecCommandRequest{Payload: &execv1.ExecCommandRequest_StdinEof{StdinEof: true}})
		} else {
			stream.CloseSend()
		}
	})
	ended := false
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if !ended {
				t.Error("the stream ended without an exit code")
			}
			return o
		}
		if err != nil {
			t.Fatal(err)
		}
		if ended {
			t.Errorf("%v after the exit code", r)
		}
		switch p := r.GetPayload().(type) {
		case *execv1.ExecCommandResponse_Stdout:
			o.Stdout += string(p.Stdout)
		case *execv1.ExecCommandResponse_Stderr:
			o.Stderr += string(p.Stderr)
		case *execv1.ExecCommandResponse_Error:
			o.Error += p.Error
		case *execv1.ExecCommandResponse_ExitCode:
			o.Code, ended = p.ExitCode, true
		}
	}
}

func TestExecCommand(t *testing.T) {
	conn := reach(t, 0)
	much := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MiB
	for name, tc := range map[string]struct {
		start *execv1.ExecStart
		input []byte
		eof   bool
		want  outcome
	}{
		"ready":                 {start: &execv1.ExecStart{Cmd: "true"}},
		"code and outputs":      {start: &execv1.ExecStart{Cmd: "sh", Args: []string{"-c", "echo out; echo err >&2; exit 3"}}, want: outcome{Stdout: "out\n", Stderr: "err\n", Code: 3}},
		"arguments as they are": {start: &execv1.ExecStart{Cmd: "printf", Args: []string{"%s.", "a b", "$HOME"}}, want: outcome{Stdout: "a b.$HOME."}},
		"a shell's line":        {start: &execv1.ExecStart{Shell: true, Cmd: "echo a |", Args: []string{"tr", "a", "b"}}, want: outcome{Stdout: "b\n"}},
		"directory, variables":  {start: &execv1.ExecStart{Shell: true, Cmd: "echo $A $PWD", Cwd: "/usr", Env: map[string]string{"A": "x"}}, want: outcome{Stdout: "x /usr\n"}},
		"input and its end":     {start: &execv1.ExecStart{Cmd: "cat", HasStdin: true}, input: much, eof: true, want: outcome{Stdout: string(much)}},
		"input and half-close":  {start: &execv1.ExecStart{Cmd: "cat", HasStdin: true}, input: []byte("hi"), want: outcome{Stdout: "hi"}},
		"input nobody said":     {start: &execv1.ExecStart{Cmd: "cat"}, input: []byte("hi"), eof: true},
		"half-close, no input":  {start: &execv1.ExecStart{Cmd: "sh", Args: []string{"-c", "sleep 0.2; echo here"}}, want: outcome{Stdout: "here\n"}},
		"no such command":       {start: &execv1.ExecStart{Cmd: "no-such-command"}, want: outcome{Error: "no-such-command: not found in the guest", Code: 127}},
		"no such user":          {start: &execv1.ExecStart{Cmd: "true", User: "nobody-there"}, want: outcome{Error: "user nobody-there: not found in the guest", Code: 126}},
		"its time is over":      {start: &execv1.ExecStart{Cmd: "sleep", Args: []string{"60"}, TimeoutSeconds: 1}, want: outcome{Code: 128 + 15}},
		"it had time enough":    {start: &execv1.ExecStart{Cmd: "true", TimeoutSeconds: 5}},
		"a signal":              {start: &execv1.ExecStart{Shell: true, Cmd: "kill -9 $$"}, want: outcome{Code: 137}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, execute(t, conn, tc.start, tc.input, tc.eof)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// One that does not hear SIGTERM is ended all the same.
func TestExecCommandIsKilled(t *testing.T) {
	began := time.Now()
	o := execute(t, reach(t, 0), &execv1.ExecStart{Shell: true, Cmd: "trap '' TERM; while :; do sleep 0.1; done", TimeoutSeconds: 1}, nil, false)
	if took := time.Since(began); o.Code != 137 || took < 6*time.Second || took > 15*time.Second {
		t.Errorf("%+v after %v", o, took)
	}
}

// proxy opens a stream to what stands for a guest's sshd.
func proxy(t *testing.T, serve func(*net.TCPConn)) sshv1.MicroVMSSHProxy_SSHProxyClient {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		conn, err := l.Accept()
		if err == nil {
			serve(conn.(*net.TCPConn))
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	stream, err := sshv1.NewMicroVMSSHProxyClient(reach(t, uint16(l.Addr().(*net.TCPAddr).Port))).SSHProxy(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&sshv1.SSHProxyRequest{Payload: &sshv1.SSHProxyRequest_Uid{Uid: "x"}}); err != nil {
		t.Fatal(err)
	}
	return stream
}

func say(t *testing.T, stream sshv1.MicroVMSSHProxy_SSHProxyClient, b []byte) {
	t.Helper()
	for ; len(b) > 0; b = b[min(len(b), 32<<10):] {
		if err := stream.Send(&sshv1.SSHProxyRequest{Payload: &sshv1.SSHProxyRequest_Data{Data: b[:min(len(b), 32<<10)]}}); err != nil {
			t.Error(err)
			return
		}
	}
}

// hearAll is all that comes, and how it ends.
func hearAll(stream sshv1.MicroVMSSHProxy_SSHProxyClient) (all []byte, err error) {
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, r.GetData()...)
	}
}

// A client's half-close is sshd's end of input; what that says afterwards comes.
func TestSSHProxyHalfClose(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	stream := proxy(t, func(conn *net.TCPConn) {
		all, _ := io.ReadAll(conn)
		conn.Write(append(all, "done"...))
	})
	say(t, stream, data)
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if got, err := hearAll(stream); err != nil || string(got) != string(data)+"done" {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// sshd's end is the stream's, with all that it has said, while the client may still speak.
func TestSSHProxyServerEnds(t *testing.T) {
	stream := proxy(t, func(conn *net.TCPConn) {
		hello := make([]byte, 5)
		io.ReadFull(conn, hello)
		conn.Write(append(bytes.Repeat([]byte{'x'}, 1<<20), hello...))
	})
	say(t, stream, []byte("hello"))
	if got, err := hearAll(stream); err != nil || len(got) != 1<<20+5 || !strings.HasSuffix(string(got), "xhello") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestSSHProxyWithoutSSHD(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	stream, err := sshv1.NewMicroVMSSHProxyClient(reach(t, port)).SSHProxy(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&sshv1.SSHProxyRequest{Payload: &sshv1.SSHProxyRequest_Uid{Uid: "x"}})
	if _, err := hearAll(stream); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}

// TestServerInfo: battery and fl go by it.
func TestServerInfo(t *testing.T) {
	for name, tc := range map[string]struct {
		config Config

		enabled bool
		want    string // the address; empty: that of the client's connection
	}{
		"off":              {},
		"where it came":    {config: Config{Listen: "0.0.0.0:9090", ExecAPI: true, SSHProxyAPI: true}, enabled: true},
		"advertised":       {config: Config{Listen: "0.0.0.0:9090", ExecAPI: true, SSHProxyAPI: true, Advertise: "host.example:4000"}, enabled: true, want: "host.example:4000"},
		"without its port": {config: Config{Listen: "0.0.0.0:9191", ExecAPI: true, SSHProxyAPI: true, Advertise: "fd00::1"}, enabled: true, want: "[fd00::1]:9191"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.config.Host, tc.config.Version, tc.config.BuildDate, tc.config.Revision = host.New(host.Config{}), "v9.9.9", "2026-11-23T17:00:00Z", "0e16607"
			s := grpc.NewServer()
			v1alpha1.RegisterMicroVMServer(s, &microVM{Config: tc.config})
			l, err := net.Listen("tcp", "127.0.0.2:0") // not where a server listens by default
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() { s.Serve(l) })
			conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { conn.Close(); s.Stop(); serving.Wait() }()
			r, err := v1alpha1.NewMicroVMClient(conn).ServerInfo(soon(t), &emptypb.Empty{})
			if err != nil {
				t.Fatal(err)
			}
			v := r.GetVersion()
			if v.GetVersion() != "v0.15.2" || v.GetIngotVersion() != "v9.9.9" || v.GetBuildDate() != "2026-11-23T17:00:00Z" || v.GetCommitHash() != "0e16607" {
				t.Errorf("version %v", v)
			}
			if r.GetUptime().AsDuration() <= 0 {
				t.Errorf("uptime %v", r.GetUptime())
			}
			want := ""
			if tc.enabled {
				if want = tc.want; want == "" {
					want = l.Addr().String()
				}
			}
			for _, s := range []*v1alpha1.GuestAgentServiceInfo{r.GetExec(), r.GetSshProxy()} {
				if s.GetEnabled() != tc.enabled || s.GetAddress() != want {
					t.Errorf("service %v, want it %t at %q", s, tc.enabled, want)
				}
			}
		})
	}
}
