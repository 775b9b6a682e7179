package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	registry "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/dhcp"
	"ingot/internal/pki"
	"ingot/internal/wire"
)

const (
	hubAddress   = "192.168.10.2"
	hubAPI       = hubAddress + ":9091"
	hubRegistry  = hubAddress + ":5000"
	segmentCards = 3
)

// hubDirs are what a hub keeps: leases, what it exports, and images.
var hubDirs = []string{"/var/lib/dhcp", "/etc/dhcp", "/etc/default", "/var/lib/ingot/registry"}

// segment is a network with a hub's interface, and clients that have namespaces of
// their own.
type segment struct {
	dir      string
	cards    [segmentCards]string
	clients  []*exec.Cmd
	network  string            // what look said of an undisturbed hub
	exported map[string]string // what it wrote
	took     []time.Duration   // how long hubs took to serve
}

// newSegment makes it, in namespaces that a test has for itself.
func newSegment(t *testing.T) *segment {
	t.Helper()
	s := &segment{dir: t.TempDir(), exported: map[string]string{}}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/run", "/etc", "/var/lib"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	sh(t, `set -e; ip link set lo up; ip link add uplink type veth peer name world; ip link set uplink up
		ip link add segment type bridge; ip addr add `+hubAddress+`/25 dev segment; ip link set segment up`)
	for i := range s.cards {
		s.cards[i] = fmt.Sprintf("02:00:00:00:00:%02x", i)
		sh(t, fmt.Sprintf(`set -e; ip netns add g%[1]d; ip link add p%[1]d type veth peer name eth0 address %[2]s netns g%[1]d
			ip link set p%[1]d master segment up; ip -n g%[1]d link set lo up; ip -n g%[1]d link set eth0 up`, i, s.cards[i]))
	}
	// Addresses of IPv6 come later than links.
	await(t, "the interfaces", func() bool { return !strings.Contains(sh(t, "ip -o addr show; ip -o link show"), "tentative") })
	ca, err := pki.OpenCA(s.dir+"/ca", "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hub", "operator"} {
		if _, err := ca.Ensure(filepath.Join(s.dir, name), name, nil, []netip.Addr{netip.MustParseAddr(hubAddress)}); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`format: 1
interface: segment
uplink: uplink
address: 192.168.10.2
subnet: 192.168.10.0/25
range-first: 192.168.10.26
range-last: 192.168.10.126
domain: lab.internal
machines: [{name: network-hub, address: 192.168.10.2}, {name: host-0, address: 192.168.10.3}]
pki: %[1]s/hub
token-file: %[1]s/token
registry: %[2]s
`, s.dir, hubDirs[3])
	script := "#!/bin/sh\ncase $1 in\ndeconfig) ip addr flush dev eth0 ;;\nbound|renew) ip addr replace $ip/25 dev eth0 ;;\nesac\necho $1 $ip\n"
	for file, text := range map[string]string{"hub.yaml": config, "token": "secret\n", "script": script} {
		if err := os.WriteFile(filepath.Join(s.dir, file), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.empty(t)
	return s
}

// empty leaves nothing of earlier hubs on disk.
func (s *segment) empty(t *testing.T) {
	t.Helper()
	for _, dir := range hubDirs {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
}

// save remembers what is on disk.
func (s *segment) save(t *testing.T) {
	t.Helper()
	sh(t, "tar -cPf "+s.dir+"/saved.tar "+strings.Join(hubDirs, " "))
}

// restore has on disk what was saved, or nothing.
func (s *segment) restore(t *testing.T, saved bool) {
	t.Helper()
	s.empty(t)
	if saved {
		sh(t, "tar -xPf "+s.dir+"/saved.tar")
	}
	sh(t, "nft flush ruleset; sysctl -qw net.ipv4.conf.segment.forwarding=0 net.ipv4.conf.uplink.forwarding=0")
}

// hubProcess is a hub, and who asks it for something.
type hubProcess struct {
	*segment
	cmd    *exec.Cmd
	log    said
	ended  chan struct{}
	err    error // how it ended
	ctx    context.Context
	tracer *exec.Cmd
	steps  chan string // what the tracer says
	conn   *grpc.ClientConn
	api    ingotv1.HubClient
	http   *http.Transport
}

// said is written by one goroutine and read by others.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start starts a hub, which is killed before the step of that number; none if it
// is 0.
func (s *segment) start(t *testing.T, step int) *hubProcess {
	t.Helper()
	h := &hubProcess{segment: s, ended: make(chan struct{}), steps: make(chan string)}
	// It begins when the tracer follows it.
	h.cmd = exec.Command("sh", "-c", `read -r begin && exec "$@"`, "sh", "ingot", "hub", "--config", s.dir+"/hub.yaml")
	begin, err := h.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	h.cmd.Stdout, h.cmd.Stderr = &h.log, &h.log
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if step > 0 {
		var lines *bufio.Scanner
		h.tracer, lines = startTracer(t, h.cmd.Process.Pid, step, h.cmd.Process.Pid)
		go func() {
			defer close(h.steps)
			for lines.Scan() {
				h.steps <- lines.Text()
			}
		}()
	}
	fmt.Fprintln(begin, "begin")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	h.ctx = ctx
	go func() {
		h.err = h.cmd.Wait()
		cancel()
		close(h.ended)
	}()
	operator := pki.In(s.dir + "/operator")
	if h.conn, err = wire.Dial(wire.Target{Address: hubAPI, TLS: operator, Token: "secret"}); err != nil {
		t.Fatal(err)
	}
	h.api = ingotv1.NewHubClient(h.conn)
	trust, err := operator.Client()
	if err != nil {
		t.Fatal(err)
	}
	h.http = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trust.RootCAs}}
	return h
}

// kill ends it as a power cut would.
func (h *hubProcess) kill() {
	h.cmd.Process.Kill()
	<-h.ended
	h.conn.Close()
	h.http.CloseIdleConnections()
}

// stop ends it as an operator would, and says how it ended.
func (h *hubProcess) stop() error {
	h.conn.Close()
	h.http.CloseIdleConnections()
	h.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-h.ended:
		return h.err
	case <-time.After(20 * time.Second):
		h.cmd.Process.Kill()
		<-h.ended
		return errors.New("the hub did not end when it was told to")
	}
}

// serves waits until it does.
func (h *hubProcess) serves() error {
	for h.ctx.Err() == nil {
		c, err := net.Dial("tcp", hubAPI)
		if err == nil {
			return c.Close()
		}
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("it does not serve: %w", h.ctx.Err())
}

// work is all that a hub is for.
func (h *hubProcess) work(p promises) error {
	for _, step := range []func(promises) error{h.setUp, h.lease, h.reserve, h.push} {
		if err := step(p); err != nil {
			return err
		}
	}
	return nil
}

func (h *hubProcess) setUp(promises) error {
	if err := h.serves(); err != nil {
		return err
	}
	f, err := h.api.Facts(h.ctx, &emptypb.Empty{})
	if err != nil {
		return err
	}
	if !f.GetDhcp().GetServing() || !f.GetDns().GetServing() || !f.GetRegistry().GetServing() || !f.GetNat().GetForwarding() || len(f.GetNat().GetMissing()) > 0 {
		return fmt.Errorf("it serves, and its facts are %v", f)
	}
	return nil
}

// lease has clients come, renew, and go by either way.
func (h *hubProcess) lease(p promises) error {
	one, err := h.bind(p, 0)
	if err != nil {
		return err
	}
	asked := time.Now()
	if err := one.do(unix.SIGUSR1, "renew"); err != nil {
		return err
	}
	p.lasting(h.cards[0], asked)
	two, err := h.bind(p, 1)
	if err != nil {
		return err
	}
	delete(p, "until "+h.cards[1])
	err = p.keep("lease "+h.cards[1], func() (string, error) {
		if err := two.do(unix.SIGUSR2, "deconfig"); err != nil {
			return "", err
		}
		// Nobody answers a release. It is told once it is in the log.
		return "", h.until(func() bool {
			leases, err := dhcp.ReadLeases("/var/lib/dhcp/dhcpd.leases")
			for _, l := range leases {
				if l.State == dhcp.Active && l.MAC.String() == h.cards[1] {
					return false
				}
			}
			return err == nil
		})
	})
	if err != nil {
		return err
	}
	delete(p, "until "+h.cards[0])
	return p.keep("lease "+h.cards[0], func() (string, error) {
		_, err := h.api.ReleaseLease(h.ctx, &ingotv1.ReleaseLeaseRequest{Mac: h.cards[0]})
		return "", err
	})
}

// reserve keeps an address for a client, and for another one that does not come.
func (h *hubProcess) reserve(p promises) error {
	const other, ip, otherIP = "02:00:00:00:00:ff", "192.168.10.50", "192.168.10.51"
	for mac, ip := range map[string]string{h.cards[2]: ip, other: otherIP} {
		err := p.keep("reserved "+mac, func() (string, error) {
			l, err := h.api.Reserve(h.ctx, &ingotv1.ReserveRequest{Mac: mac, Ip: ip})
			return l.GetIp(), err
		})
		if err != nil {
			return err
		}
	}
	if _, err := h.bind(p, 2); err != nil {
		return err
	}
	if got := p["lease "+h.cards[2]]; got != ip {
		return fmt.Errorf("%s was reserved, and %s given", ip, got)
	}
	return p.keep("reserved "+other, func() (string, error) {
		_, err := h.api.Unreserve(h.ctx, &ingotv1.UnreserveRequest{Mac: other})
		return "", err
	})
}

// push has one image come and stay, and another one go. Both are pulled.
func (h *hubProcess) push(p promises) error {
	for _, tag := range []string{"box:stays", "box:goes"} {
		img, err := random.Image(3000, 2)
		if err != nil {
			return err
		}
		ref, err := name.ParseReference(hubRegistry + "/" + tag)
		if err != nil {
			return err
		}
		layers, err := img.Layers()
		if err != nil {
			return err
		}
		for _, layer := range layers {
			digest, err := layer.Digest()
			if err != nil {
				return err
			}
			blob := "blob " + ref.Context().Digest(digest.String()).String()
			if err := p.keep(blob, func() (string, error) { return "there", registry.WriteLayer(ref.Context(), layer, h.options()...) }); err != nil {
				return err
			}
		}
		digest, err := img.Digest()
		if err != nil {
			return err
		}
		pinned := ref.Context().Digest(digest.String())
		delete(p, "image "+ref.String())
		err = p.keep("image "+pinned.String(), func() (string, error) { return digest.String(), registry.Write(ref, img, h.options()...) })
		if err != nil {
			return err
		}
		p["image "+ref.String()] = digest.String()
		if err := h.pullImage(ref.String(), digest.String()); err != nil {
			return err
		}
		if tag == "box:goes" {
			return h.delete(p, ref, pinned, layers)
		}
	}
	return nil
}

func (h *hubProcess) delete(p promises, ref name.Reference, pinned name.Digest, layers []v1.Layer) error {
	for _, layer := range layers { // they may go with it, or later
		digest, err := layer.Digest()
		if err != nil {
			return err
		}
		delete(p, "blob "+ref.Context().Digest(digest.String()).String())
	}
	delete(p, "image "+ref.String())
	err := p.keep("image "+pinned.String(), func() (string, error) { return "", registry.Delete(pinned, h.options()...) })
	if err != nil {
		return err
	}
	p["image "+ref.String()] = ""
	return nil
}

// beginPush sends a part of a blob.
func (h *hubProcess) beginPush() error {
	client := &http.Client{Transport: h.http}
	send := func(method, url, body string) (*http.Response, error) {
		r, err := http.NewRequestWithContext(h.ctx, method, url, strings.NewReader(body))
		if err != nil {
			return nil, err
		}
		r.SetBasicAuth("ingot", "secret")
		a, err := client.Do(r)
		if err != nil {
			return nil, err
		}
		if a.Body.Close(); a.StatusCode != http.StatusAccepted {
			return nil, fmt.Errorf("%s %s: %s", method, url, a.Status)
		}
		return a, nil
	}
	a, err := send(http.MethodPost, "https://"+hubRegistry+"/v2/half/blobs/uploads/", "")
	if err != nil {
		return err
	}
	at, err := a.Location()
	if err != nil {
		return err
	}
	_, err = send(http.MethodPatch, at.String(), "half of it")
	return err
}

func (h *hubProcess) options() []registry.Option {
	return []registry.Option{
		registry.WithContext(h.ctx), registry.WithTransport(h.http), registry.WithAuth(&authn.Basic{Username: "ingot", Password: "secret"}),
		registry.WithRetryBackoff(registry.Backoff{Steps: 1}), // who is killed does not answer again
	}
}

// keeps says which promises the hub does not keep.
func (h *hubProcess) keeps(p promises) error {
	r, err := h.api.ListLeases(h.ctx, &ingotv1.ListLeasesRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	var broken []error
	wrong := func(format string, args ...any) { broken = append(broken, fmt.Errorf(format, args...)) }
	is := promises{}
	for _, l := range r.GetLeases() {
		if what := "lease " + l.GetMac(); l.GetState() == dhcp.Active {
			if other := is[what]; other != "" {
				wrong("%s has %s and %s", l.GetMac(), other, l.GetIp())
			}
			is[what] = l.GetIp()
			p.last(wrong, "the hub", l.GetMac(), l.GetEnds().AsTime())
		}
		if l.GetReserved() {
			is["reserved "+l.GetMac()] = l.GetIp()
		}
	}
	p.hold(wrong, "the hub", "lease ", is)
	p.hold(wrong, "the hub", "reserved ", is)
	for what, answer := range p {
		var err error
		kind, ref, _ := strings.Cut(what, " ")
		if kind == "blob" {
			err = h.pullBlob(ref)
		} else if kind == "image" {
			err = h.pullImage(ref, answer)
		}
		if err != nil {
			wrong("%s: %w", what, err)
		}
	}
	return errors.Join(append(broken, h.complete())...)
}

// complete finds that each image that the registry lists can be pulled.
func (h *hubProcess) complete() error {
	r, err := name.NewRegistry(hubRegistry)
	if err != nil {
		return err
	}
	repositories, err := registry.Catalog(h.ctx, r, h.options()...)
	if err != nil {
		return fmt.Errorf("list repositories: %w", err)
	}
	for _, repository := range repositories {
		tags, err := registry.List(r.Repo(repository), h.options()...)
		if err != nil && strings.Contains(err.Error(), "NAME_UNKNOWN") {
			continue // a manifest that got no tag, which may be meant by its digest
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", repository, err)
		}
		for _, tag := range tags {
			img, err := registry.Image(r.Repo(repository).Tag(tag), h.options()...)
			if err == nil {
				err = validate.Image(img)
			}
			if err != nil {
				return fmt.Errorf("%s:%s is listed: %w", repository, tag, err)
			}
		}
	}
	return nil
}

func (h *hubProcess) pullBlob(ref string) error {
	digest, err := name.NewDigest(ref)
	if err != nil {
		return err
	}
	layer, err := registry.Layer(digest, h.options()...)
	if err != nil {
		return err
	}
	content, err := layer.Compressed()
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, content) // which verifies it
	return errors.Join(err, content.Close())
}

// pullImage pulls what must be that digest, or not there if it is empty.
func (h *hubProcess) pullImage(text, digest string) error {
	ref, err := name.ParseReference(text)
	if err != nil {
		return err
	}
	img, err := registry.Image(ref, h.options()...)
	if digest == "" {
		if err == nil {
			return errors.New("it was deleted, and is there")
		}
		if strings.Contains(err.Error(), "MANIFEST_UNKNOWN") || strings.Contains(err.Error(), "NAME_UNKNOWN") {
			return nil
		}
	}
	if err != nil {
		return err
	}
	if got, err := img.Digest(); err != nil || got.String() != digest {
		return fmt.Errorf("it is %s, not %s: %w", got, digest, err)
	}
	return validate.Image(img)
}

// until waits until something is so, for as long as the hub lives.
func (h *hubProcess) until(is func() bool) error {
	for !is() {
		if h.ctx.Err() != nil {
			return h.ctx.Err()
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil
}

// dhcpClient is a DHCP client that runs.
type dhcpClient struct {
	h     *hubProcess
	cmd   *exec.Cmd
	lines chan string // `bound ADDRESS`, `renew ADDRESS`, …
}

// bind gets an address for a card. It is nobody else's, and the card's old one if it
// was promised that.
func (h *hubProcess) bind(p promises, n int) (*dhcpClient, error) {
	what := "lease " + h.cards[n]
	before := p[what]
	c := &dhcpClient{h: h, lines: make(chan string, 100)}
	c.cmd = exec.Command("ip", "netns", "exec", fmt.Sprintf("g%d", n), "busybox", "udhcpc",
		"-i", "eth0", "-f", "-t", "20", "-T", "1", "-A", "1", "-s", h.dir+"/script", "-x", fmt.Sprintf("hostname:box-%d", n))
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	h.clients = append(h.clients, c.cmd)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			c.lines <- lines.Text()
		}
	}()
	asked := time.Now()
	err = p.keep(what, func() (string, error) { return c.await("bound") })
	if err != nil {
		return nil, err
	}
	p.lasting(h.cards[n], asked)
	ip := p[what]
	if before != "" && ip != before && p["reserved "+h.cards[n]] != ip {
		return nil, fmt.Errorf("%s had %s, and got %s", h.cards[n], before, ip)
	}
	for other, its := range p {
		if strings.HasPrefix(other, "lease ") && other != what && its == ip {
			return nil, fmt.Errorf("%s got %s, which is that of %s", h.cards[n], ip, other)
		}
	}
	return c, nil
}

// await waits for an event, and returns the address that goes with it.
func (c *dhcpClient) await(event string) (ip string, err error) {
	for {
		select {
		case line := <-c.lines:
			if what, ip, _ := strings.Cut(line, " "); what == event {
				return ip, nil
			}
		case <-c.h.ctx.Done():
			return "", fmt.Errorf("the client is not told %s: %w", event, c.h.ctx.Err())
		}
	}
}

func (c *dhcpClient) do(signal syscall.Signal, event string) error {
	if err := c.cmd.Process.Signal(signal); err != nil {
		return err
	}
	_, err := c.await(event)
	return err
}

// endClients takes those away that still run, and their addresses, which they do not
// give back: a hub that knows nothing of them would find them in use.
func (s *segment) endClients(t *testing.T) {
	t.Helper()
	for _, c := range s.clients {
		c.Process.Kill()
		c.Wait()
	}
	s.clients = nil
	for i := range s.cards {
		sh(t, fmt.Sprintf("ip -n g%d addr flush dev eth0", i))
	}
}
