package rpc

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/host"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// microVM is flintlock's service.
type microVM struct {
	v1alpha1.UnimplementedMicroVMServer
	Config
}

func message(v host.View) *types.MicroVM { return wire.ToProto(v.Spec, v.Status, v.Dir) }

// mostKey is how long a request's key may be.
const mostKey = 128

func (s *microVM) CreateMicroVM(ctx context.Context, r *v1alpha1.CreateMicroVMRequest) (*v1alpha1.CreateMicroVMResponse, error) {
	if r.GetMicrovm() == nil {
		return nil, status.Error(codes.InvalidArgument, "invalid create microvm request: MicroVMSpec required")
	}
	spec, err := wire.SpecFromProto(r.Microvm)
	if err != nil {
		return nil, err
	}
	if len(r.GetRequestKey()) > mostKey {
		return nil, &vm.FieldError{Field: "request_key", Problem: fmt.Sprintf("has more than %d characters", mostKey)}
	}
	v, err := s.Host.Create(ctx, spec, r.GetRequestKey())
	if err != nil {
		return nil, err
	}
	return &v1alpha1.CreateMicroVMResponse{Microvm: message(v)}, nil
}

// emptyUID is flintlock's answer to a missing uid, with the words by which its
// clients recognise that there is nothing.
var errEmptyUID = status.Error(codes.InvalidArgument, "invalid request: uid is required: microvm spec not found")

func (s *microVM) DeleteMicroVM(_ context.Context, r *v1alpha1.DeleteMicroVMRequest) (*emptypb.Empty, error) {
	if r.GetUid() == "" {
		return nil, errEmptyUID
	}
	return &emptypb.Empty{}, s.Host.Delete(r.Uid)
}

func (s *microVM) GetMicroVM(_ context.Context, r *v1alpha1.GetMicroVMRequest) (*v1alpha1.GetMicroVMResponse, error) {
	if r.GetUid() == "" {
		return nil, errEmptyUID
	}
	v, err := s.Host.Get(r.Uid)
	if err != nil {
		return nil, err
	}
	return &v1alpha1.GetMicroVMResponse{Microvm: message(v)}, nil
}

func (s *microVM) ListMicroVMs(_ context.Context, r *v1alpha1.ListMicroVMsRequest) (*v1alpha1.ListMicroVMsResponse, error) {
	views := s.Host.List(r.GetNamespace(), r.GetName())
	answer := v1alpha1.ListMicroVMsResponse{Microvm: make([]*types.MicroVM, len(views))}
	for i, v := range views {
		answer.Microvm[i] = message(v)
	}
	return &answer, nil
}

func (s *microVM) ListMicroVMsStream(r *v1alpha1.ListMicroVMsRequest, stream v1alpha1.MicroVM_ListMicroVMsStreamServer) error {
	if r.GetNamespace() == "" {
		return status.Error(codes.InvalidArgument, "invalid request: namespace is required")
	}
	for _, v := range s.Host.List(r.Namespace, "") {
		if err := stream.Send(&v1alpha1.ListMessage{Microvm: message(v)}); err != nil {
			return err
		}
	}
	return nil
}
