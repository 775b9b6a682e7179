package wire

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
)

// stream is one on which each message has come already.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stream) Context() context.Context { return s.ctx }

func (s stream) RecvMsg(any) error { return nil }

// TestProbesAreNotAudited: to look at guests each minute must not bury the rest.
func TestProbesAreNotAudited(t *testing.T) {
	for args, want := range map[string]int{"true": 0, "ping -c 1 192.168.10.2": 0, "rm -r /": 2, "truetype": 2} {
		var b bytes.Buffer
		s := &auditedStream{ServerStream: stream{ctx: t.Context()}, method: "/ingot.v1.Host/Exec", log: slog.New(slog.NewTextHandler(&b, nil))}
		s.RecvMsg(&ingotv1.ExecRequest{Payload: &ingotv1.ExecRequest_Start{Start: &ingotv1.ExecStart{Uid: "01K", Args: strings.Fields(args)}}})
		s.RecvMsg(&ingotv1.ExecRequest{})
		s.end(0, nil)
		if got := strings.Count(b.String(), "msg=audit"); got != want {
			t.Errorf("%s: %d lines, want %d: %s", args, got, want, b.String())
		}
	}
}
