package main

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// explain is err in one line for a person: what, where, and where it is known,
// what to do. A gRPC error's text is what the server said of it.
func explain(err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok && s.Code() != codes.Unknown {
		// FromError's message repeats the wrapping in front of "rpc error: …".
		text = strings.ReplaceAll(text, "rpc error: code = "+s.Code().String()+" desc = ", "")
	}
	text = strings.Join(strings.Fields(text), " ")
	switch {
	case errors.Is(err, context.Canceled), status.Code(err) == codes.Canceled:
		return "interrupted"
	case status.Code(err) == codes.Unauthenticated, status.Code(err) == codes.PermissionDenied:
		text += " (the environment's certificates or token have changed; `ingot up` renews them)"
	}
	return text
}
