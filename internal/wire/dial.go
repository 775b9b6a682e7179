package wire

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"ingot/internal/pki"
)

// Error turns an error with a meaning (package errdefs) into a gRPC status. A
// status that is one already stays as it is.
func Error(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return status.Error(codes.Canceled, err.Error())
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	return errgrpc.ToGRPC(err)
}

// Target is a service to dial.
type Target struct {
	Address    string // host:port
	TLS        pki.Files
	ServerName string // empty: the host of Address
	Token      pki.Secret
	Insecure   bool // plaintext, for a service that was made so by choice
}

// Dial prepares a connection; the first call makes it.
func Dial(t Target) (*grpc.ClientConn, error) {
	options := []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16 << 20)),
		// A machine that is off is told of while a person still waits, and one that
		// is back is found at once.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
	}
	if t.Insecure {
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	} else {
		c, err := t.TLS.Client()
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", t.Address, err)
		}
		c.ServerName = t.ServerName
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	}
	if t.Token != "" {
		options = append(options, grpc.WithPerRPCCredentials(basic{token: t.Token, secure: !t.Insecure}))
	}
	return grpc.NewClient("passthrough:///"+t.Address, options...)
}

// basic sends the token the way flintlock's clients do.
type basic struct {
	token  pki.Secret
	secure bool
}

func (b basic) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte(b.token))}, nil
}

func (b basic) RequireTransportSecurity() bool { return b.secure }
