package wire

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"ingot/internal/pki"
)

// introduction is how long a client may take to say who it is. A server that ends waits
// for those that don't.
const introduction = 5 * time.Second

// ServerOptions are what all our gRPC servers share: a Door, and patience with clients
// that ping often.
func ServerOptions(token pki.Secret, log *slog.Logger) []grpc.ServerOption {
	door := Door{Token: token, Log: log}
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.ConnectionTimeout(introduction),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(door.Unary),
		grpc.ChainStreamInterceptor(door.Stream),
	}
}

// MaxMessage is how large a request may be: a spec has its user data in it.
const MaxMessage = 16 << 20

// Door is what each call passes, however it came: the token, if there is one, errors
// with their codes, a panic that ends a call and not the daemon, and a line in the log
// for each call that changes something.
type Door struct {
	Token pki.Secret
	Log   *slog.Logger
}

// Unary is the door of calls with one answer.
func (d Door) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (answer any, err error) {
	began := time.Now()
	defer func() { audit(ctx, d.Log, info.FullMethod, target(req), "took", time.Since(began), "err", err) }()
	defer recovered(info.FullMethod, d.Log, &err)
	if err := authorize(ctx, d.Token); err != nil {
		return nil, err
	}
	answer, err = next(ctx, req)
	return answer, Error(err)
}

// Stream is the door of streams.
func (d Door) Stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	began := time.Now()
	a := &auditedStream{ServerStream: s, method: info.FullMethod, log: d.Log}
	defer func() { a.end(time.Since(began), err) }()
	defer recovered(info.FullMethod, d.Log, &err)
	if err := authorize(s.Context(), d.Token); err != nil {
		return err
	}
	return Error(next(srv, a))
}

func recovered(method string, log *slog.Logger, err *error) {
	if p := recover(); p != nil {
		log.Error("a call panicked", "method", method, "err", p, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "%s: internal error, see the daemon's log", method)
	}
}

// authorize wants `Basic base64(token)`, as flintlock does, or `Bearer token`.
func authorize(ctx context.Context, token pki.Secret) error {
	if token == "" {
		return nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	given := md.Get("authorization")
	if len(given) != 1 {
		return status.Error(codes.Unauthenticated, "Request unauthenticated with basic")
	}
	scheme, value, _ := strings.Cut(given[0], " ")
	switch strings.ToLower(scheme) {
	case "basic":
		text, err := base64.StdEncoding.DecodeString(value)
		if err != nil {
			return status.Error(codes.Unauthenticated, "invalid auth token: not base64")
		}
		value = string(text)
	case "bearer":
	default:
		return status.Error(codes.Unauthenticated, "Request unauthenticated with basic")
	}
	if subtle.ConstantTimeCompare([]byte(value), []byte(token)) != 1 {
		return status.Error(codes.Unauthenticated, "invalid auth token: wrong token")
	}
	return nil
}
