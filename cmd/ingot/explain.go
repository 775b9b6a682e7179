package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What gRPC puts around a server's error, and around one of a connection.
var (
	preamble   = regexp.MustCompile(`rpc error: code = \w+ desc = `)
	connection = regexp.MustCompile(`(?:latest balancer error: )?connection error: desc = "(?:transport: (?:Error while dialing|authentication handshake failed): )?((?:[^"\\]|\\.)*)"`)
)

// explain is err in one line for a person: what, where, and where it is known,
// what to do about the environment of that name. Of a gRPC error it has what the server said; joined errors stand
// side by side.
func explain(err error, name string) string {
	if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
		return "interrupted"
	}
	var lines []string
	for line := range strings.Lines(plain(err.Error())) {
		if line = strings.Join(strings.Fields(line), " "); line != "" {
			lines = append(lines, line)
		}
	}
	text := short(strings.Join(lines, "; "))
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		text += " (ingot needs root: sudo ingot …)"
	}
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		text += " (the environment's certificates or token have changed; `ingot up` renews them)"
	}
	return pasteable(text, name)
}

// short cuts out the middle of what is no message any more, but somebody's file.
func short(text string) string {
	const most = 2000
	if len(text) <= most {
		return text
	}
	return text[:most/2] + " … " + text[len(text)-most/2:]
}

// plain takes gRPC's own words out of an error's text.
func plain(text string) string {
	return connection.ReplaceAllString(preamble.ReplaceAllString(text, ""), "$1")
}
