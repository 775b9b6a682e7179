package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	reflection "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"ingot/internal/pki"
)

// stranger is a client that has none of our code: it knows the services from the proto
// files as the server shows them (reflection), as grpcurl does, and writes JSON.
type stranger struct {
	conn    *grpc.ClientConn
	service map[string]protoreflect.ServiceDescriptor
}

// newStranger asks for the services by name.
func newStranger(t *testing.T, conn *grpc.ClientConn, names ...string) *stranger {
	t.Helper()
	s := &stranger{conn: conn, service: map[string]protoreflect.ServiceDescriptor{}}
	stream, err := reflection.NewServerReflectionClient(conn).ServerReflectionInfo(s.context(t), grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	for _, name := range names {
		if err := stream.Send(&reflection.ServerReflectionRequest{MessageRequest: &reflection.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: name}}); err != nil {
			t.Fatal(err)
		}
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if r.GetErrorResponse() != nil {
			t.Fatalf("%s: %v", name, r.GetErrorResponse())
		}
		for _, b := range r.GetFileDescriptorResponse().GetFileDescriptorProto() { // those that have not come before
			file := &descriptorpb.FileDescriptorProto{}
			if err := proto.Unmarshal(b, file); err != nil {
				t.Fatal(err)
			}
			set.File = append(set.File, file)
		}
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		d, err := files.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			t.Fatal(err)
		}
		s.service[name] = d.(protoreflect.ServiceDescriptor)
	}
	return s
}

func (s *stranger) context(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer secret")
}

const (
	microVMService = "microvm.services.api.v1alpha1.MicroVM"
	execService    = "microvmexec.services.api.v1alpha1.MicroVMExec"
	sshService     = "microvmsshproxy.services.api.v1alpha1.MicroVMSSHProxy"
	hostService    = "ingot.v1.Host"
)

// conversation is a stream of a method, in JSON.
type conversation struct {
	grpc.ClientStream
	method protoreflect.MethodDescriptor
}

func (s *stranger) begin(t *testing.T, service, method string, requests ...string) *conversation {
	t.Helper()
	d := s.service[service].Methods().ByName(protoreflect.Name(method))
	stream, err := s.conn.NewStream(s.context(t), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+service+"/"+method)
	if err != nil {
		t.Fatal(err)
	}
	c := &conversation{stream, d}
	for _, r := range requests {
		c.say(t, r)
	}
	return c
}

func (c *conversation) say(t *testing.T, request string) {
	t.Helper()
	m := dynamicpb.NewMessage(c.method.Input())
	if err := protojson.Unmarshal([]byte(request), m); err != nil {
		t.Fatalf("%s: %v", request, err)
	}
	if err := c.SendMsg(m); err != nil && !errors.Is(err, io.EOF) { // Recv says why
		t.Fatal(err)
	}
}

// hear is the next answer.
func (c *conversation) hear() (map[string]any, error) {
	m := dynamicpb.NewMessage(c.method.Output())
	if err := c.RecvMsg(m); err != nil {
		return nil, err
	}
	b, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var answer map[string]any
	return answer, json.Unmarshal(b, &answer)
}

// call is a method with one answer.
func (s *stranger) call(t *testing.T, service, method, request string) (map[string]any, error) {
	t.Helper()
	c := s.begin(t, service, method, request)
	if err := c.CloseSend(); err != nil {
		t.Fatal(err)
	}
	return c.hear()
}

// at is what is at a path of keys.
func at(v any, path ...string) any {
	for _, key := range path {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

const closedConfig = `grpc-endpoint: 127.0.0.1:9090
bridge-name: br0
state-dir: %[1]s/state
pool: %[1]s/containerd
tls-cert: %[1]s/server/cert.pem
tls-key: %[1]s/server/key.pem
tls-client-validate: true
tls-client-ca: %[1]s/server/ca.pem
basic-auth-token: secret
enable-exec-api: true
enable-ssh-proxy-api: true
enable-http: true
http-endpoint: 127.0.0.1:8090
`

// TestFlintlockClient: a client that has only the proto files, a certificate and the token
// creates a microVM, sees it start, works in it, and deletes it, by gRPC and by HTTP.
func TestFlintlockClient(t *testing.T) {
	if !onMachine(t) {
		return
	}
	m := newMachine(t)
	m.killDaemon()
	ca, err := pki.OpenCA(m.dir+"/ca", "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "client"} {
		if _, err := ca.Ensure(m.dir+"/"+name, name, nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(m.dir+"/config.yaml", fmt.Appendf(nil, closedConfig, m.dir), 0o600); err != nil {
		t.Fatal(err)
	}
	security, err := pki.In(m.dir + "/client").Client()
	if err != nil {
		t.Fatal(err)
	}
	m.daemon = m.start(t, "daemon.log", "host", "--config", m.dir+"/config.yaml")
	conn, err := grpc.NewClient("127.0.0.1:9090", grpc.WithTransportCredentials(credentials.NewTLS(security)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := newStranger(t, conn, microVMService, execService, sshService, hostService)
	uid := s.create(t)
	t.Run("info", func(t *testing.T) { s.testInfo(t) })
	t.Run("exec", func(t *testing.T) { s.testExec(t, uid) })
	t.Run("ssh", func(t *testing.T) { s.testSSH(t, uid) })
	t.Run("refused", func(t *testing.T) { s.testRefused(t) })
	t.Run("http", func(t *testing.T) { testHTTP(t, security, uid) })
	s.remove(t, uid)
}

func (s *stranger) testInfo(t *testing.T) {
	info, err := s.call(t, microVMService, "ServerInfo", "{}")
	if err != nil {
		t.Fatal(err)
	}
	for _, service := range []string{"exec", "sshProxy"} {
		if at(info, service, "enabled") != true || at(info, service, "address") != "127.0.0.1:9090" {
			t.Errorf("%s: %v", service, at(info, service))
		}
	}
	if v := at(info, "version", "version"); v != "v0.15.2" {
		t.Errorf("version %v", v)
	}
}

// specOf is what hammertime sends: an interface without a type, which is MACVTAP.
func specOf(name, image string, agent bool) string {
	return fmt.Sprintf(`{"id":%q,"namespace":"test","vcpu":1,"memoryInMb":128,"labels":{"a":"b"},"allowGuestAgent":%t,
		"kernel":{"image":"test.local/kernel:latest","filename":"boot/vmlinux","addNetworkConfig":true},
		"rootVolume":{"id":"root","source":{"containerSource":%q}},"interfaces":[{"deviceId":"eth1"}]}`, name, agent, image)
}

// create makes a microVM and returns when its agent is ready.
func (s *stranger) create(t *testing.T) (uid string) {
	t.Helper()
	answer, err := s.call(t, microVMService, "CreateMicroVM", `{"microvm":`+specOf("one", "test.local/root:latest", true)+`}`)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ = at(answer, "microvm", "spec", "uid").(string)
	if at(answer, "microvm", "status", "state") != "PENDING" || len(uid) != 26 || at(answer, "microvm", "version").(float64) < 1 {
		t.Errorf("created: %v", answer)
	}
	watch := s.begin(t, hostService, "Watch", fmt.Sprintf(`{"uid":%q}`, uid))
	if err := watch.CloseSend(); err != nil {
		t.Fatal(err)
	}
	var last map[string]any
	for at(last, "microvm", "status", "agentReady") != true {
		if last, err = watch.hear(); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.call(t, microVMService, "GetMicroVM", fmt.Sprintf(`{"uid":%q}`, uid))
	if err != nil {
		t.Fatal(err)
	}
	spec, st := at(got, "microvm", "spec"), at(got, "microvm", "status")
	condition, _ := at(st, "conditions").([]any)
	interfaces, _ := at(spec, "interfaces").([]any)
	if at(st, "state") != "CREATED" || at(spec, "labels", "a") != "b" || at(spec, "provider") != "qemu" || at(spec, "createdAt") == nil || at(spec, "updatedAt") == nil {
		t.Errorf("got %v", got)
	}
	if len(interfaces) != 2 || at(interfaces[0], "deviceId") != "eth0" || at(interfaces[1], "type") != "TAP" ||
		len(condition) != 1 || at(condition[0], "message") != "eth1 is a tap on bridge br0 and not a macvtap: the host has no parent-iface" {
		t.Errorf("interfaces %v, conditions %v", interfaces, condition)
	}
	return uid
}

func (s *stranger) testExec(t *testing.T, uid string) {
	c := s.begin(t, execService, "ExecCommand",
		fmt.Sprintf(`{"start":{"uid":%q,"cmd":"read x; echo got $x; exit 4","shell":true,"hasStdin":true}}`, uid), `{"stdin":"aGVsbG8K"}`, `{"stdinEof":true}`)
	var out string
	for {
		r, err := c.hear()
		if err != nil {
			t.Fatal(err)
		}
		if b, ok := at(r, "stdout").(string); ok {
			out += b
		}
		if code, ok := at(r, "exitCode").(float64); ok {
			if code != 4 || out != "Z290IGhlbGxvCg==" { // got hello
				t.Errorf("code %v, output %s", code, out)
			}
			break
		}
	}
	if r, err := c.hear(); !errors.Is(err, io.EOF) {
		t.Errorf("after the exit code: %v, %v", r, err)
	}
}

// testSSH has a server in the place of the guest's: the hollow guest shares our
// network.
func (s *stranger) testSSH(t *testing.T, uid string) {
	l, err := net.Listen("tcp", "127.0.0.1:22")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		all, _ := io.ReadAll(conn)
		fmt.Fprintf(conn, "SSH-2.0-%s", all)
	})
	c := s.begin(t, sshService, "SSHProxy", fmt.Sprintf(`{"uid":%q}`, uid), `{"data":"aGVsbG8="}`)
	if err := c.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if r, err := c.hear(); err != nil || at(r, "data") != "U1NILTIuMC1oZWxsbw==" { // SSH-2.0-hello
		t.Errorf("%v, %v", r, err)
	}
	if r, err := c.hear(); !errors.Is(err, io.EOF) {
		t.Errorf("afterwards: %v, %v", r, err)
	}
	l.Close()
	serving.Wait()
}

// testRefused has the words and codes that clients match.
func (s *stranger) testRefused(t *testing.T) {
	made := func(name, image string, agent bool) string {
		answer, err := s.call(t, microVMService, "CreateMicroVM", `{"microvm":`+specOf(name, image, agent)+`}`)
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := at(answer, "microvm", "spec", "uid").(string)
		return uid
	}
	closed, pending := made("closed", "test.local/root:latest", false), made("pending", "127.0.0.1:1/no:latest", true)
	defer s.remove(t, closed)
	defer s.remove(t, pending)
	const nobody = "01K0000000000000000000000A"
	for _, tc := range []struct {
		service, method, request string
		code                     codes.Code
		text                     string
	}{
		{execService, "ExecCommand", `{"stdinEof":true}`, codes.InvalidArgument, "first message must be a start message with uid and cmd set"},
		{execService, "ExecCommand", `{"start":{"uid":"x"}}`, codes.InvalidArgument, "first message must be a start message with uid and cmd set"},
		{execService, "ExecCommand", `{"start":{"cmd":"true"}}`, codes.InvalidArgument, "first message must be a start message with uid and cmd set"},
		{execService, "ExecCommand", `{"start":{"uid":"x","cmd":"true","timeoutSeconds":-1}}`, codes.InvalidArgument, "timeout_seconds: -1 is negative"},
		{execService, "ExecCommand", `{"start":{"uid":"` + nobody + `","cmd":"true"}}`, codes.NotFound, "microvm spec " + nobody + " not found"},
		{execService, "ExecCommand", `{"start":{"uid":"` + closed + `","cmd":"true"}}`, codes.FailedPrecondition, "microvm was not created with guest agent access enabled"},
		{execService, "ExecCommand", `{"start":{"uid":"` + pending + `","cmd":"true"}}`, codes.FailedPrecondition, "microvm is not ready (state: pending)"},
		{sshService, "SSHProxy", `{"data":"eA=="}`, codes.InvalidArgument, "first message must set uid"},
		{sshService, "SSHProxy", `{"uid":"` + nobody + `"}`, codes.NotFound, "microvm spec " + nobody + " not found"},
		{sshService, "SSHProxy", `{"uid":"` + closed + `"}`, codes.FailedPrecondition, "microvm was not created with guest agent access enabled"},
		{sshService, "SSHProxy", `{"uid":"` + pending + `"}`, codes.FailedPrecondition, "microvm is not ready (state: pending)"},
		{microVMService, "CreateMicroVM", `{}`, codes.InvalidArgument, "invalid create microvm request: MicroVMSpec required"},
		{microVMService, "CreateMicroVM", `{"microvm":{"id":"x","rootVolume":{"source":{"containerSource":"x"}},"interfaces":[{"deviceId":"eth1"}]}}`, codes.InvalidArgument, "kernel.image: is required"},
		{microVMService, "CreateMicroVM", `{"microvm":` + strings.Replace(specOf("x", "x", true), "{", `{"provider":"bochs",`, 1) + `}`, codes.InvalidArgument, "provider: microvm provider bochs isn't available"},
		{microVMService, "GetMicroVM", `{}`, codes.InvalidArgument, "invalid request"},
		{microVMService, "GetMicroVM", `{}`, codes.InvalidArgument, "not found"},
		{microVMService, "GetMicroVM", `{"uid":"` + nobody + `"}`, codes.NotFound, "microvm spec " + nobody + " not found"},
		{microVMService, "DeleteMicroVM", `{"uid":"` + nobody + `"}`, codes.NotFound, "microvm spec " + nobody + " not found"},
		{microVMService, "ListMicroVMsStream", `{}`, codes.InvalidArgument, "invalid request"},
	} {
		if answer, err := s.call(t, tc.service, tc.method, tc.request); status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.text) {
			t.Errorf("%s %s: %v, %v; want %v, %s", tc.method, tc.request, answer, err, tc.code, tc.text)
		}
	}
	// A list takes an empty namespace and an empty name for all, as hammertime asks.
	if all, err := s.call(t, microVMService, "ListMicroVMs", `{"namespace":"","name":""}`); err != nil || len(at(all, "microvm").([]any)) != 3 {
		t.Errorf("list: %v, %v", all, err)
	}
}

// remove deletes a microVM and waits until it is not found.
func (s *stranger) remove(t *testing.T, uid string) {
	t.Helper()
	request := fmt.Sprintf(`{"uid":%q}`, uid)
	for range 2 { // the second changes nothing, or finds nothing
		if _, err := s.call(t, microVMService, "DeleteMicroVM", request); err != nil && status.Code(err) != codes.NotFound {
			t.Errorf("delete: %v", err)
		}
	}
	await(t, "the end of "+uid, func() bool {
		got, err := s.call(t, microVMService, "GetMicroVM", request)
		if err == nil && (at(got, "microvm", "status", "state") != "DELETING" || at(got, "microvm", "spec", "deletedAt") == nil) {
			t.Errorf("while it is deleted: %v", got)
		}
		return status.Code(err) == codes.NotFound && strings.HasSuffix(status.Convert(err).Message(), "microvm spec "+uid+" not found")
	})
}

func testHTTP(t *testing.T, security *tls.Config, uid string) {
	transport := &http.Transport{TLSClientConfig: security}
	defer transport.CloseIdleConnections()
	ask := func(method, path, body string) (int, map[string]any) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, "https://127.0.0.1:8090"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Basic c2VjcmV0")
		answer, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.NewDecoder(bytes.NewReader(text)).Decode(&got); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, text)
		}
		return answer.StatusCode, got
	}
	code, got := ask("GET", "/v1alpha1/microvm/"+uid, "")
	// Names in camel case, and what is zero is there too.
	if code != 200 || at(got, "microvm", "spec", "memoryInMb") != 128.0 || at(got, "microvm", "spec", "rootVolume", "isReadOnly") != false || at(got, "microvm", "status", "retry") != 0.0 {
		t.Errorf("get: %d %v", code, got)
	}
	for path, want := range map[string]int{"/v1alpha1/microvm/test": 1, "/v1alpha1/microvm/test?name=one": 1, "/v1alpha1/microvm/test?name=two": 0, "/v1alpha1/microvm/other": 0} {
		if code, got := ask("GET", path, ""); code != 200 || len(at(got, "microvm").([]any)) != want {
			t.Errorf("%s: %d %v", path, code, got)
		}
	}
	if code, got := ask("POST", "/microvm.services.api.v1alpha1.MicroVM/ListMicroVMsStream", `{"namespace":"test"}`); code != 200 || at(got, "result", "microvm", "spec", "uid") != uid {
		t.Errorf("stream: %d %v", code, got)
	}
	code, got = ask("POST", "/v1alpha1/microvm", specOf("two", "test.local/root:latest", false))
	second, _ := at(got, "microvm", "spec", "uid").(string)
	if code != 200 || len(second) != 26 {
		t.Fatalf("create: %d %v", code, got)
	}
	if code, got := ask("DELETE", "/v1alpha1/microvm/"+second, ""); code != 200 || len(got) != 0 {
		t.Errorf("delete: %d %v", code, got)
	}
	await(t, "the end of "+second, func() bool {
		code, got = ask("GET", "/v1alpha1/microvm/"+second, "")
		return code == 404
	})
	if at(got, "code") != 5.0 || !strings.HasSuffix(at(got, "message").(string), "not found") || at(got, "details") == nil {
		t.Errorf("gone: %v", got)
	}
}

// TestPorts: guests are kept from the ports of all services of their host.
func TestPorts(t *testing.T) {
	c := defaultHostConfig()
	c.GRPCEndpoint = "192.168.10.3:9090"
	for on, want := range map[bool][]uint16{false: {9090}, true: {9090, 8090}} {
		c.EnableHTTP = on
		if got, err := c.ports(); err != nil || !slices.Equal(got, want) {
			t.Errorf("HTTP %t: %v, %v, want %v", on, got, err, want)
		}
	}
	c.EnableHTTP, c.HTTPEndpoint = true, "8090"
	if got, err := c.ports(); err == nil {
		t.Errorf("an endpoint without a port: %v", got)
	}
}
