// Package claim is the one call that Ingot adds to containerd's API: Make takes
// a lease and everything under it in a single transaction of containerd's
// database. The same by containerd's own calls is a transaction for the lease
// and two for each snapshot, each with two syncs of the disk. What is made is
// ordinary: leases and snapshots that every client of containerd sees.
//
// The package owns the message format; the daemon implements the call.
package claim

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const method = "/ingot.containerd.v1.Claims/Make"

// RoomLabel on a snapshot of an image's layer, while it is unpacked, asks for a
// file system of so many times the usual size. containerd shows a snapshotter
// labels with this beginning only.
const RoomLabel = "containerd.io/snapshot/ingot.room"

// MostRoom is the most that can be asked for.
const MostRoom = 16

// Request says what a lease is to hold.
type Request struct {
	Lease     string            `json:"lease"`
	Labels    map[string]string `json:"labels,omitempty"` // of a lease that is not there yet
	Snapshots []Snapshot        `json:"snapshots,omitempty"`
	Keep      []Resource        `json:"keep,omitempty"`
}

// Snapshot is a writable snapshot to be made, or to be found as it is.
type Snapshot struct {
	Snapshotter string            `json:"snapshotter"`
	Key         string            `json:"key"`
	Parent      string            `json:"parent"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Resource is something that is there already and must stay; its type is as
// leases have it: snapshots/native, content.
type Resource struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// Response gives each snapshot's file or directory, by its key.
type Response struct {
	Paths map[string]string `json:"paths"`
}

// Maker makes claims: all of a request or nothing. A parent that is missing is
// errdefs.ErrNotFound.
type Maker interface {
	Make(context.Context, Request) (Response, error)
}

// Make asks the daemon at the other end. The context carries containerd's
// namespace.
func Make(ctx context.Context, conn grpc.ClientConnInterface, r Request) (Response, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return Response{}, fmt.Errorf("claim %s: %w", r.Lease, err)
	}
	var answer wrapperspb.BytesValue
	if err := conn.Invoke(ctx, method, wrapperspb.Bytes(body), &answer); err != nil {
		return Response{}, fmt.Errorf("claim %s: %w", r.Lease, errgrpc.ToNative(err))
	}
	var out Response
	if err := json.Unmarshal(answer.GetValue(), &out); err != nil {
		return Response{}, fmt.Errorf("claim %s: %w", r.Lease, err)
	}
	return out, nil
}

// Register adds the call to a gRPC server.
func Register(s *grpc.Server, m Maker) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "ingot.containerd.v1.Claims",
		HandlerType: (*Maker)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Make", Handler: handle}},
	}, m)
}

func handle(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
	in := new(wrapperspb.BytesValue)
	if err := decode(in); err != nil {
		return nil, err
	}
	call := func(ctx context.Context, in any) (any, error) {
		return answer(ctx, srv.(Maker), in.(*wrapperspb.BytesValue).GetValue())
	}
	if intercept == nil {
		return call(ctx, in)
	}
	return intercept(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, call)
}

func answer(ctx context.Context, m Maker, body []byte) (any, error) {
	var r Request
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("decode claim: %w", err))
	}
	out, err := m.Make(ctx, r)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	body, err = json.Marshal(out)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return wrapperspb.Bytes(body), nil
}
