package rpc

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sshv1 "ingot/api/services/microvmsshproxy/v1alpha1"
	"ingot/internal/agent"
)

// sshPort is where a guest's sshd listens.
const sshPort = 22

// microVMSSHProxy is flintlock's service for ssh to guests. sshd knows who may log in;
// the agent only joins the two.
type microVMSSHProxy struct {
	sshv1.UnimplementedMicroVMSSHProxyServer
	*hostService
	port uint16
}

// errNoUID is what a first message gets that does not name a microVM.
var errNoUID = status.Error(codes.InvalidArgument, "first message must set uid")

func (s *microVMSSHProxy) SSHProxy(stream sshv1.MicroVMSSHProxy_SSHProxyServer) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return errNoUID
	}
	if err != nil {
		return err
	}
	if first.GetUid() == "" {
		return errNoUID
	}
	client, err := s.reach(stream.Context(), first.GetUid())
	if err != nil {
		return err
	}
	return s.join(stream, client)
}

// join joins a client to the guest's sshd until that has said all.
func (s *microVMSSHProxy) join(stream sshv1.MicroVMSSHProxy_SSHProxyServer, client *agent.Client) error {
	typed := newTyping(func(int) error { return nil })
	defer typed.end(io.ErrClosedPipe)
	s.hear(func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				typed.end(err)
				return
			}
			typed.add(r.GetData())
		}
	})
	session, err := client.Dial(stream.Context(), s.port, typed, writer(func(p []byte) error {
		return stream.Send(&sshv1.SSHProxyResponse{Data: p})
	}))
	if err != nil {
		return told(err)
	}
	_, err = session.Wait()
	var refused *agent.Error
	if errors.As(err, &refused) {
		return fmt.Errorf("reach the guest's sshd: %w: %w", err, errdefs.ErrUnavailable)
	}
	return told(err)
}
