package rpc

import (
	"context"
	"net"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"ingot/api/services/microvm/v1alpha1"
)

// FlintlockVersion is the flintlock that this host is as good as: its clients refuse
// one that is older. Ingot's own version stands beside it.
const FlintlockVersion = "v0.15.2"

func (s *microVM) ServerInfo(ctx context.Context, _ *emptypb.Empty) (*v1alpha1.ServerInfoResponse, error) {
	service := func(enabled bool) *v1alpha1.GuestAgentServiceInfo {
		if !enabled {
			return &v1alpha1.GuestAgentServiceInfo{}
		}
		return &v1alpha1.GuestAgentServiceInfo{Enabled: true, Address: s.address(ctx)}
	}
	return &v1alpha1.ServerInfoResponse{
		Version: &v1alpha1.VersionInfo{
			Version: FlintlockVersion, BuildDate: s.BuildDate, CommitHash: s.Revision, IngotVersion: s.Version,
		},
		Uptime: durationpb.New(s.Host.Uptime()), Exec: service(s.ExecAPI), SshProxy: service(s.SSHProxyAPI),
	}, nil
}

// address is where the caller reaches this server: what the operator says, else the
// address by which it came. Only who came from this machine by its loopback is told
// of that.
func (s *microVM) address(ctx context.Context) string {
	_, port, err := net.SplitHostPort(s.Listen)
	if err != nil {
		port = "9090"
	}
	if s.Advertise != "" {
		if _, _, err := net.SplitHostPort(s.Advertise); err == nil {
			return s.Advertise
		}
		return net.JoinHostPort(s.Advertise, port)
	}
	if p, ok := peer.FromContext(ctx); ok && p.LocalAddr != nil {
		return p.LocalAddr.String()
	}
	return s.Listen
}
