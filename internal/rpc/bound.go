package rpc

import (
	"context"
	"fmt"
	"net"
	"path"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/run"
)

// How many calls are at work at the same time, from all clients and from one address.
// A stream is one for as long as it is open: a watch, a console, a command, a log.
const (
	mostCreates, mostCreatesEach = 400, 200
	mostCalls, mostCallsEach     = 4000, 2000
	mostStreams, mostStreamsEach = 4000, 1000
	// mostOnConnection is where a client's library makes it wait, without a word: after
	// that there is an answer.
	mostOnConnection = mostCallsEach + mostStreamsEach + 1000
	// mostHeader is what names and tokens have.
	mostHeader = 64 << 10
)

// bound refuses calls above a number: those that are at work are worth more than those
// that would slow all down.
type bound struct{ creates, calls, streams *run.Quota }

func newBound() bound {
	return bound{
		creates: run.NewQuota(mostCreates, mostCreatesEach), calls: run.NewQuota(mostCalls, mostCallsEach),
		streams: run.NewQuota(mostStreams, mostStreamsEach),
	}
}

// options are those of a server that keeps to the bounds.
func (b bound) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(mostOnConnection), grpc.MaxHeaderListSize(mostHeader),
		grpc.ChainUnaryInterceptor(b.unary), grpc.ChainStreamInterceptor(b.stream),
	}
}

func (b bound) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	q, what := b.calls, "calls"
	if info.FullMethod == v1alpha1.MicroVM_CreateMicroVM_FullMethodName {
		q, what = b.creates, "creates"
	}
	give, err := take(ctx, q, what, info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer give()
	return next(ctx, req)
}

func (b bound) stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	give, err := take(s.Context(), b.streams, "watches, consoles, commands and logs", info.FullMethod)
	if err != nil {
		return err
	}
	defer give()
	return next(srv, s)
}

func take(ctx context.Context, q *run.Quota, what, method string) (give func(), err error) {
	var from net.Addr = &net.UnixAddr{}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		from = p.Addr
	}
	give, ok := q.Take(from)
	if ok {
		return give, nil
	}
	all, each := q.Limits()
	return nil, fmt.Errorf("%s: %d %s are at work on this host, or %d from your address, which is the most: end some, or try again: %w",
		path.Base(method), all, what, each, errdefs.ErrResourceExhausted)
}
