package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/run"
	"ingot/internal/wire"
)

// Gateway serves flintlock's MicroVM over HTTP, as JSON, where flintlock's gateway has
// it. It calls the service itself, through the same door and with the same TLS as
// gRPC, and dials nothing.
type Gateway struct {
	c       Config
	listen  string
	service *microVM
	door    wire.Door
	bound   bound
	ready   chan struct{}
}

// NewGateway makes the gateway of a server with the same configuration.
func NewGateway(c Config, listen string) *Gateway {
	return &Gateway{c: c, listen: listen, service: &microVM{Config: c}, door: wire.Door{Token: c.Token, Log: c.Log}, bound: newBound(), ready: make(chan struct{})}
}

// Ready is closed once the gateway listens.
func (g *Gateway) Ready() <-chan struct{} { return g.ready }

func (g *Gateway) String() string { return "http gateway" }

// What a client may take, so that slow ones do not pile up.
const (
	headTime = 10 * time.Second
	callTime = time.Minute
	idleTime = 2 * time.Minute
	lastTime = 2 * time.Second // when the daemon ends
	maxHead  = 64 << 10
)

// Run serves until ctx ends.
func (g *Gateway) Run(ctx context.Context) error {
	l, err := run.Listen(ctx, net.ListenConfig{}, "tcp", g.listen)
	if err != nil {
		return fmt.Errorf("serve HTTP on %s: %w", g.listen, err)
	}
	s := &http.Server{
		Handler: g.handler(), TLSConfig: g.c.TLS.Clone(), MaxHeaderBytes: maxHead,
		ReadHeaderTimeout: headTime, ReadTimeout: callTime, WriteTimeout: callTime, IdleTimeout: idleTime,
		ErrorLog: slog.NewLogLogger(g.c.Log.Handler(), slog.LevelDebug), // what passers-by do wrong
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTime)
		defer cancel()
		if s.Shutdown(rest) != nil {
			s.Close()
		}
	})
	close(g.ready)
	if g.c.TLS == nil {
		err = s.Serve(l)
	} else {
		err = s.ServeTLS(l, "", "")
	}
	if stop() {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	<-ended
	return nil
}

// A route is a method and a path of HTTP, and what of the service it is.
type route struct {
	pattern string // as http.ServeMux has it
	methods []string
	serve   func(g *Gateway, w http.ResponseWriter, r *http.Request) error
}

const collection, item = "/v1alpha1/microvm", "/v1alpha1/microvm/{name}"

// routes are flintlock's. Methods without a path of their own are reached by their
// full name.
var routes = []route{
	{"POST " + collection, []string{"CreateMicroVM"}, (*Gateway).create},
	{"DELETE " + item, []string{"DeleteMicroVM"}, (*Gateway).remove},
	{"GET " + item, []string{"GetMicroVM", "ListMicroVMs"}, (*Gateway).getOrList},
	{"POST " + unbound("ListMicroVMsStream"), []string{"ListMicroVMsStream"}, (*Gateway).stream},
	{"POST " + unbound("ServerInfo"), []string{"ServerInfo"}, (*Gateway).serverInfo},
}

func unbound(method string) string {
	return "/" + v1alpha1.MicroVM_ServiceDesc.ServiceName + "/" + method
}

func (g *Gateway) handler() http.Handler {
	mux := http.NewServeMux()
	for _, route := range routes {
		mux.HandleFunc(route.pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, wire.MaxMessage)
			if err := route.serve(g, w, r); err != nil {
				fail(w, err)
			}
		})
	}
	known := []string{collection, item, unbound("ListMicroVMsStream"), unbound("ServerInfo")}
	for _, path := range known { // a path with another method is more specific with one
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			fail(w, status.Error(codes.Unimplemented, "Method Not Allowed"))
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fail(w, status.Error(codes.NotFound, "Not Found")) })
	// A browser that has a certificate, or is on this machine, must not be had by any page.
	strangers := http.NewCrossOriginProtection()
	strangers.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fail(w, status.Error(codes.PermissionDenied, "a page of another origin may not ask for this"))
	}))
	return strangers.Handler(mux)
}

func (g *Gateway) create(w http.ResponseWriter, r *http.Request) error {
	return g.call(w, r, "CreateMicroVM", func(m proto.Message) error {
		spec := &types.MicroVMSpec{}
		m.(*v1alpha1.CreateMicroVMRequest).Microvm = spec
		return read(r, spec)
	})
}

func (g *Gateway) remove(w http.ResponseWriter, r *http.Request) error {
	return g.call(w, r, "DeleteMicroVM", func(m proto.Message) error {
		m.(*v1alpha1.DeleteMicroVMRequest).Uid = r.PathValue("name")
		return nil
	})
}

func (g *Gateway) serverInfo(w http.ResponseWriter, r *http.Request) error {
	return g.call(w, r, "ServerInfo", func(m proto.Message) error { return read(r, m) })
}

// aUID is what a uid looks like; so may a namespace.
var aUID = regexp.MustCompile(`^[0-9A-HJKMNP-TV-Z]{26}$`)

// getOrList is of one microVM by its uid, else of a namespace. In flintlock both have
// this path, and the second hides the first.
func (g *Gateway) getOrList(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	var missing error
	if aUID.MatchString(name) {
		answer, err := g.ask(r, "GetMicroVM", func(m proto.Message) error {
			m.(*v1alpha1.GetMicroVMRequest).Uid = name
			return nil
		})
		if err == nil || status.Code(err) != codes.NotFound {
			return reply(w, answer, err)
		}
		missing = err
	}
	answer, err := g.ask(r, "ListMicroVMs", func(m proto.Message) error {
		list := m.(*v1alpha1.ListMicroVMsRequest)
		list.Namespace = name
		if q := r.URL.Query(); q.Has("name") {
			list.Name = proto.String(q.Get("name"))
		}
		return nil
	})
	if err == nil && missing != nil && len(answer.(*v1alpha1.ListMicroVMsResponse).Microvm) == 0 {
		err = missing // it was a uid, then
	}
	return reply(w, answer, err)
}

// call asks the service and writes what it answers.
func (g *Gateway) call(w http.ResponseWriter, r *http.Request, method string, fill func(proto.Message) error) error {
	answer, err := g.ask(r, method, fill)
	return reply(w, answer, err)
}

// ask calls a method with one answer, through the door.
func (g *Gateway) ask(r *http.Request, method string, fill func(proto.Message) error) (proto.Message, error) {
	d := v1alpha1.MicroVM_ServiceDesc
	i := slices.IndexFunc(d.Methods, func(m grpc.MethodDesc) bool { return m.MethodName == method })
	answer, err := d.Methods[i].Handler(g.service, g.context(r), func(m any) error { return fill(m.(proto.Message)) }, g.enter)
	if err != nil {
		return nil, err
	}
	return answer.(proto.Message), nil
}

// enter is what each call passes, as by gRPC.
func (g *Gateway) enter(ctx context.Context, r any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	bounded := func(ctx context.Context, r any) (any, error) { return g.bound.unary(ctx, r, info, next) }
	let := func(ctx context.Context, r any) (any, error) { return g.door.Unary(ctx, r, info, bounded) }
	return g.c.unary(ctx, r, info, let)
}

// context is what a call by gRPC would have: who asks, and what it is let in by.
func (g *Gateway) context(r *http.Request) context.Context {
	p := &peer.Peer{Addr: address(r.RemoteAddr)}
	if r.TLS != nil {
		p.AuthInfo = credentials.TLSInfo{State: *r.TLS, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		p.LocalAddr = g.beside(local)
	}
	ctx := peer.NewContext(r.Context(), p)
	return metadata.NewIncomingContext(ctx, metadata.MD{"authorization": r.Header.Values("Authorization")})
}

// beside is where gRPC is for somebody who came to this address of the gateway's.
func (g *Gateway) beside(local net.Addr) net.Addr {
	host, _, err := net.SplitHostPort(local.String())
	_, port, err2 := net.SplitHostPort(g.c.Listen)
	if errors.Join(err, err2) != nil {
		return local
	}
	return address(net.JoinHostPort(host, port))
}

// address is a host and port of TCP.
type address string

func (address) Network() string { return "tcp" }

func (a address) String() string { return string(a) }

// read reads the body. Fields that are not known are passed over, as they are in gRPC.
func read(r *http.Request, m proto.Message) error {
	body, err := io.ReadAll(r.Body)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return status.Errorf(codes.InvalidArgument, "the body is larger than %d bytes", large.Limit)
	case err != nil:
		return status.Errorf(codes.InvalidArgument, "read the body: %v", err)
	case len(body) == 0:
		return nil
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(body, m); err != nil {
		return status.Error(codes.InvalidArgument, sameSpace(err.Error()))
	}
	return nil
}

// sameSpace undoes what protobuf does so that nobody relies on its texts: a blank that
// is another one in each build.
func sameSpace(text string) string { return strings.ReplaceAll(text, "\u00a0", " ") }

// The form of answers: flintlock's, with each field there.
var asJSON = protojson.MarshalOptions{EmitUnpopulated: true}

func reply(w http.ResponseWriter, answer proto.Message, err error) error {
	if err != nil {
		return err
	}
	body, err := asJSON.Marshal(answer)
	if err != nil {
		return err
	}
	write(w, http.StatusOK, body)
	return nil
}

func fail(w http.ResponseWriter, err error) {
	s, _ := status.FromError(wire.Error(err))
	body, err := asJSON.Marshal(readable(s))
	if err != nil { // details of a type that nobody knows
		body = fmt.Appendf(nil, `{"code":%d,"message":"","details":[]}`, s.Code())
	}
	if s.Code() == codes.Unauthenticated {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	write(w, httpStatus(s.Code()), body)
}

func write(w http.ResponseWriter, code int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(body) // a client that went needs no answer
}

// readable is a status as JSON can hold it: its text may quote anything.
func readable(s *status.Status) proto.Message {
	p := s.Proto()
	p.Message = strings.ToValidUTF8(p.Message, "\uFFFD")
	return p
}

// httpStatus is a code's, as google.rpc.Code says.
func httpStatus(c codes.Code) int {
	switch c {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return 499 // the client's request was closed
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// stream is the listing in lines, each with a result or an error.
func (g *Gateway) stream(w http.ResponseWriter, r *http.Request) error {
	d := v1alpha1.MicroVM_ServiceDesc.Streams[0] // the only one
	info := &grpc.StreamServerInfo{FullMethod: unbound(d.StreamName), IsServerStream: true}
	lines := &lineStream{ctx: g.context(r), w: w, r: r}
	w.Header().Set("Content-Type", "application/json")
	bounded := func(srv any, s grpc.ServerStream) error { return g.bound.stream(srv, s, info, d.Handler) }
	let := func(srv any, s grpc.ServerStream) error { return g.door.Stream(srv, s, info, bounded) }
	err := g.c.stream(g.service, lines, info, let)
	if err != nil && lines.began { // it is too late for a status
		s, _ := status.FromError(err)
		return lines.line("error", readable(s))
	}
	return err
}

// lineStream is a stream of which the one request is the body, and each answer a line.
type lineStream struct {
	grpc.ServerStream // there is no more of one
	ctx               context.Context
	w                 http.ResponseWriter
	r                 *http.Request
	began             bool
}

func (s *lineStream) Context() context.Context { return s.ctx }

func (s *lineStream) RecvMsg(m any) error { return read(s.r, m.(proto.Message)) }

func (s *lineStream) SendMsg(m any) error {
	s.began = true
	return s.line("result", m.(proto.Message))
}

func (s *lineStream) line(key string, m proto.Message) error {
	body, err := asJSON.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.w, "{%q:%s}\n", key, body)
	return err
}
