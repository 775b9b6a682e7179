package wire_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/pki"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// service answers by what it is asked for.
type service struct {
	v1alpha1.UnimplementedMicroVMServer
	ingotv1.UnimplementedHostServer
}

// client is of both services.
type client struct {
	v1alpha1.MicroVMClient
	ingotv1.HostClient
}

// Exec fails when the client has said all.
func (service) Exec(s grpc.BidiStreamingServer[ingotv1.ExecRequest, ingotv1.ExecResponse]) error {
	for {
		if _, err := s.Recv(); errors.Is(err, io.EOF) {
			return fmt.Errorf("run it: %w", errdefs.ErrNotFound)
		} else if err != nil {
			return err
		}
	}
}

var errPlain = errors.New("something went wrong")

func (service) CreateMicroVM(_ context.Context, r *v1alpha1.CreateMicroVMRequest) (*v1alpha1.CreateMicroVMResponse, error) {
	return &v1alpha1.CreateMicroVMResponse{Microvm: &types.MicroVM{Spec: r.Microvm}}, nil
}

func (service) DeleteMicroVM(_ context.Context, r *v1alpha1.DeleteMicroVMRequest) (*emptypb.Empty, error) {
	if r.Uid == "panic" {
		panic("of a handler")
	}
	return nil, map[string]error{
		"gone": fmt.Errorf("find it: %w", errdefs.ErrNotFound), "plain": errPlain,
		"field": &vm.FieldError{Field: "uid", Problem: "is odd"}, "busy": fmt.Errorf("%w: all full", errdefs.ErrResourceExhausted),
	}[r.Uid]
}

func (service) GetMicroVM(context.Context, *v1alpha1.GetMicroVMRequest) (*v1alpha1.GetMicroVMResponse, error) {
	return &v1alpha1.GetMicroVMResponse{}, nil
}

// lines is a log that may be written and read at the same time.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

// serve starts a server as ours are, and dials it with a token.
func serve(t *testing.T, log *lines) (dial func(pki.Secret) client) {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.OpenCA(filepath.Join(dir, "ca"), "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "operator"} {
		if _, err := ca.Ensure(filepath.Join(dir, name), name, nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")}); err != nil {
			t.Fatal(err)
		}
	}
	shown, err := pki.In(filepath.Join(dir, "server")).Open(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(append(wire.ServerOptions("right", slog.New(slog.NewTextHandler(log, nil))), grpc.Creds(credentials.NewTLS(shown.Config())))...)
	v1alpha1.RegisterMicroVMServer(g, service{})
	ingotv1.RegisterHostServer(g, service{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { g.Serve(l) })
	t.Cleanup(func() { g.Stop(); running.Wait() })
	return func(token pki.Secret) client {
		c, err := wire.Dial(wire.Target{Address: l.Addr().String(), TLS: pki.In(filepath.Join(dir, "operator")), Token: token})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return client{v1alpha1.NewMicroVMClient(c), ingotv1.NewHostClient(c)}
	}
}

func TestCodes(t *testing.T) {
	c := serve(t, &lines{})("right")
	for uid, want := range map[string]codes.Code{
		"": codes.OK, "gone": codes.NotFound, "plain": codes.Unknown, "field": codes.InvalidArgument, "busy": codes.ResourceExhausted, "panic": codes.Internal,
	} {
		_, err := c.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: uid})
		if got := status.Code(err); got != want {
			t.Errorf("%q: %v, want %v", uid, err, want)
		}
	}
}

func TestToken(t *testing.T) {
	dial := serve(t, &lines{})
	for token, want := range map[pki.Secret]codes.Code{"right": codes.OK, "wrong": codes.Unauthenticated, "": codes.Unauthenticated} {
		_, err := dial(token).GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{})
		if got := status.Code(err); got != want {
			t.Errorf("token %q: %v, want %v", string(token), err, want)
		}
	}
}

// TestAudit: one line for what changes something, with who asked; none for the rest.
func TestAudit(t *testing.T) {
	var log lines
	dial := serve(t, &log)
	c := dial("right")
	expect := func(words ...string) {
		t.Helper()
		got := log.take()
		if strings.Count(got, "msg=audit") != min(1, len(words)) {
			t.Errorf("audit: %q", got)
		}
		for _, w := range words {
			if !strings.Contains(got, w) {
				t.Errorf("audit without %s: %q", w, got)
			}
		}
	}
	c.CreateMicroVM(t.Context(), &v1alpha1.CreateMicroVMRequest{Microvm: &types.MicroVMSpec{Id: "one", Namespace: "ns", Metadata: map[string]string{"user-data": "c2VjcmV0"}}})
	expect("method=/microvm.services.api.v1alpha1.MicroVM/CreateMicroVM", "who=operator", "from=127.0.0.1:", "target=ns/one", "err=<nil>")
	c.DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: "gone"})
	expect("DeleteMicroVM", "target=gone", `err="rpc error: code = NotFound`)
	c.GetMicroVM(t.Context(), &v1alpha1.GetMicroVMRequest{})
	expect()
	dial("wrong").DeleteMicroVM(t.Context(), &v1alpha1.DeleteMicroVMRequest{Uid: "x"})
	expect("DeleteMicroVM", "who=operator", "Unauthenticated")

	// A stream has a line when it begins and when it ends.
	stream, err := c.Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := &ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{Uid: "one", Args: []string{"login", "secret"}}}}
	if err := stream.Send(start); err != nil {
		t.Fatal(err)
	}
	began := ""
	for range 500 {
		if began = log.take(); began != "" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !strings.Contains(began, "Host/Exec") || !strings.Contains(began, `target="one login"`) || !strings.Contains(began, "step=begin") {
		t.Errorf("at the beginning: %q", began)
	}
	stream.CloseSend()
	if _, err := stream.Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
	expect("Host/Exec", `target="one login"`, "took=", "NotFound")
}
