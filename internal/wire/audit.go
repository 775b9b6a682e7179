package wire

import (
	"context"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	ingotv1 "ingot/api/ingot/v1"
	execv1 "ingot/api/services/microvmexec/v1alpha1"
	"ingot/api/types"
)

// reading are the beginnings of the names of methods that change nothing. All
// others are in the audit: one that is added is, until somebody says otherwise.
var reading = []string{"Get", "List", "Watch", "Logs", "Facts", "Check", "Ping", "ServerReflectionInfo", "ServerInfo"}

// audit logs one line for a call that changes something: who asked, for what.
func audit(ctx context.Context, log *slog.Logger, method, target string, result ...any) {
	name := path.Base(method)
	for _, r := range reading {
		if strings.HasPrefix(name, r) {
			return
		}
	}
	who, from := caller(ctx)
	log.Info("audit", append([]any{"method", method, "who", who, "from", from, "target", target}, result...)...)
}

// harmless says whether a request is for a command in a guest by which `ingot
// inspect` looks at it, again and again. They change nothing there.
func harmless(request any) bool {
	switch r := request.(type) {
	case interface{ GetStart() *ingotv1.ExecStart }:
		s := r.GetStart()
		return len(s.GetArgs()) > 0 && slices.Contains([]string{"true", "ping"}, s.GetArgs()[0]) && !s.GetStdin() && len(s.GetEnv()) == 0
	case interface{ GetStart() *execv1.ExecStart }: // flintlock's clients ask so whether a guest is ready
		s := r.GetStart()
		return s.GetCmd() == "true" && !s.GetShell() && !s.GetHasStdin() && len(s.GetEnv()) == 0
	}
	return false
}

// caller is the name in the client's certificate, and its address.
func caller(ctx context.Context) (who, from string) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "unknown", ""
	}
	who = "unknown"
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
		who = info.State.PeerCertificates[0].Subject.CommonName
	}
	return who, p.Addr.String()
}

// target is what a request is about: a microVM, an image, a lease, a peer.
func target(request any) string {
	type (
		ofSpec  interface{ GetMicrovm() *types.MicroVMSpec }
		ofUID   interface{ GetUid() string }
		ofImage interface{ GetImage() string }
		ofCard  interface {
			GetMac() string
			GetIp() string
		}
		ofIP    interface{ GetIp() string }
		ofStart interface{ GetStart() *ingotv1.ExecStart }
		ofExec  interface{ GetStart() *execv1.ExecStart }
		ofMany  interface{ GetImages() []string }
		ofName  interface{ GetName() string }
	)
	switch r := request.(type) {
	case ofSpec:
		return r.GetMicrovm().GetNamespace() + "/" + r.GetMicrovm().GetId()
	case ofUID:
		return r.GetUid()
	case ofImage:
		return r.GetImage()
	case ofCard:
		return strings.TrimSpace(r.GetMac() + " " + r.GetIp())
	case ofIP:
		return r.GetIp()
	case ofMany:
		return strings.Join(r.GetImages(), " ")
	case ofName:
		return r.GetName()
	case ofExec: // the arguments may be secrets, and so may a shell's line
		if r.GetStart().GetShell() {
			return r.GetStart().GetUid() + " sh"
		}
		return r.GetStart().GetUid() + " " + r.GetStart().GetCmd()
	case ofStart:
		return strings.TrimSpace(r.GetStart().GetUid() + " " + strings.Join(r.GetStart().GetArgs()[:min(1, len(r.GetStart().GetArgs()))], ""))
	}
	return ""
}

// auditedStream writes a line when the stream's first message is there, which
// says what it is about: its end, which has a line too, may be a day later.
type auditedStream struct {
	grpc.ServerStream
	method string
	log    *slog.Logger
	target atomic.Pointer[string] // nil: no message was there yet
	quiet  atomic.Bool            // it is not about anything that changes
}

func (s *auditedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil && s.target.Load() == nil {
		s.quiet.Store(harmless(m))
		if t := target(m); s.target.CompareAndSwap(nil, &t) && !s.quiet.Load() {
			audit(s.Context(), s.log, s.method, t, "step", "begin")
		}
	}
	return err
}

// end writes the last line.
func (s *auditedStream) end(took time.Duration, err error) {
	if s.quiet.Load() {
		return
	}
	var about string
	if t := s.target.Load(); t != nil {
		about = *t
	}
	audit(s.Context(), s.log, s.method, about, "took", took, "err", err)
}
