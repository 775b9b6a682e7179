package hub

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/dhcp"
	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/run"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// serve is the hub's own gRPC service. It begins once the other parts serve, so
// that whoever reaches it reaches them.
func (h *Hub) serve(ctx context.Context, ready func()) error {
	for _, part := range []run.Task{h.dhcp, h.dns, h.registry} {
		select {
		case <-part.Ready():
		case <-ctx.Done():
			return nil
		}
	}
	g := grpc.NewServer(append(wire.ServerOptions(h.token, h.log), grpc.Creds(wire.TLS(h.shown.Config(), h.log)))...)
	ingotv1.RegisterHubServer(g, &service{Hub: h})
	reflection.Register(g)
	l, err := run.Listen(ctx, net.ListenConfig{}, "tcp", netip.AddrPortFrom(h.c.Address, GRPCPort).String())
	if err != nil {
		return fmt.Errorf("serve gRPC: %w", err)
	}
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	ready()
	return g.Serve(l)
}

type service struct {
	ingotv1.UnimplementedHubServer
	*Hub
}

func (s *service) lease(l dhcp.Lease) *ingotv1.Lease {
	m := &ingotv1.Lease{Ip: l.IP.String(), Mac: l.MAC.String(), Hostname: l.Hostname, State: l.State, Reserved: l.Reserved, ClientId: l.ClientID}
	if g := s.guests.withMAC(l.MAC); g != nil {
		m.Microvm = g.String()
	} else if l.State == dhcp.Reserved {
		m.Microvm = l.MicroVM
	}
	if !l.Starts.IsZero() {
		m.Starts, m.Ends = timestamppb.New(l.Starts), timestamppb.New(l.Ends)
	}
	return m
}

func (s *service) ListLeases(context.Context, *ingotv1.ListLeasesRequest) (*ingotv1.ListLeasesResponse, error) {
	var r ingotv1.ListLeasesResponse
	for _, l := range s.dhcp.Leases() {
		r.Leases = append(r.Leases, s.lease(l))
	}
	return &r, nil
}

func (s *service) Reserve(_ context.Context, r *ingotv1.ReserveRequest) (*ingotv1.Lease, error) {
	if r.GetMac() == "" && r.GetMicrovm() == "" {
		return nil, fmt.Errorf("mac: it is missing, and so is microvm: %w", errdefs.ErrInvalidArgument)
	}
	of, err := reservation(r.GetMac(), r.GetIp(), r.GetMicrovm())
	if err != nil {
		return nil, err
	}
	if namespace, name, ok := strings.Cut(of.MicroVM, "/"); ok && !of.IP.IsValid() {
		if g := s.guests.find(namespace, name); g != nil {
			of.IP = s.leased(g)
		}
	}
	l, err := s.dhcp.Reserve(of)
	if err != nil {
		return nil, err
	}
	return s.lease(l), nil
}

func (s *service) Unreserve(_ context.Context, r *ingotv1.UnreserveRequest) (*emptypb.Empty, error) {
	of, err := reservation(r.GetMac(), r.GetIp(), r.GetMicrovm())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.dhcp.Unreserve(of)
}

// reservation reads for whom an address is kept, and which.
func reservation(macText, ipText, microVM string) (r dhcp.Reservation, err error) {
	if macText != "" || microVM == "" || ipText != "" {
		if r.MAC, r.IP, err = client(macText, ipText); err != nil {
			return r, err
		}
	}
	namespace, name, ok := strings.Cut(microVM, "/")
	switch {
	case microVM == "":
		return r, nil
	case macText != "":
		return r, fmt.Errorf("mac, microvm: an address is kept for one of them: %w", errdefs.ErrInvalidArgument)
	case !ok || !vm.ValidName(namespace) || !vm.ValidName(name):
		return r, fmt.Errorf("microvm: %q is not NAMESPACE/NAME: %w", microVM, errdefs.ErrInvalidArgument)
	}
	r.MicroVM = microVM
	return r, nil
}

// client reads a MAC and an address, of which there is at least one.
func client(macText, ipText string) (mac net.HardwareAddr, ip netip.Addr, err error) {
	if macText != "" || ipText == "" {
		if mac, err = net.ParseMAC(macText); err != nil || len(mac) != 6 {
			return nil, ip, fmt.Errorf("mac: %q is not a MAC address: %w", macText, errdefs.ErrInvalidArgument)
		}
	}
	if ipText != "" {
		if ip, err = netip.ParseAddr(ipText); err != nil {
			return nil, ip, fmt.Errorf("ip: %q is not an address: %w", ipText, errdefs.ErrInvalidArgument)
		}
	}
	return mac, ip, nil
}

func (s *service) ReleaseLease(_ context.Context, r *ingotv1.ReleaseLeaseRequest) (*emptypb.Empty, error) {
	mac, ip, err := client(r.GetMac(), r.GetIp())
	if err != nil {
		return nil, err
	}
	if ip.IsValid() {
		return &emptypb.Empty{}, s.dhcp.Release(ip)
	}
	err = fmt.Errorf("release what %s has: no active lease: %w", mac, errdefs.ErrNotFound)
	for _, l := range s.dhcp.Leases() {
		if l.State == dhcp.Active && bytes.Equal(l.MAC, mac) {
			if err = s.dhcp.Release(l.IP); err != nil {
				break
			}
		}
	}
	return &emptypb.Empty{}, err
}

func (s *service) Ping(ctx context.Context, r *ingotv1.PingRequest) (*ingotv1.PingResponse, error) {
	ip, err := netip.ParseAddr(r.GetAddress())
	if err != nil {
		return nil, fmt.Errorf("address: %q is not an address: %w", r.GetAddress(), errdefs.ErrInvalidArgument)
	}
	timeout := time.Second
	if r.Timeout != nil {
		timeout = r.Timeout.AsDuration()
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	took, err := link.Ping(ctx, ip)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return &ingotv1.PingResponse{RoundTrip: durationpb.New(took)}, nil
}

// Facts says how the hub's parts are. A part that fails is a fact, and no error.
func (s *service) Facts(ctx context.Context, _ *emptypb.Empty) (*ingotv1.HubFacts, error) {
	f := &ingotv1.HubFacts{
		Version: s.c.version, Uptime: durationpb.New(time.Since(s.began)), RssBytes: wire.RSS(), ConfigFile: s.c.file,
		Dhcp: s.dhcpFacts(), Nat: s.natFacts(ctx), Registry: s.registryFacts(ctx), Vpn: s.vpnFacts(), Hosts: s.hostFacts(),
		Tailscale: s.tailscaleFacts(ctx),
	}
	f.Hostname, _ = os.Hostname()
	if s.c.Metrics.IsValid() {
		f.Metrics = s.c.Metrics.String()
	}
	d := s.dns.Facts()
	f.Dns = &ingotv1.DNSFacts{Serving: d.Serving, Upstreams: d.Upstreams, Names: int32(s.names())}
	for _, at := range d.Listen {
		f.Dns.Listen = append(f.Dns.Listen, at.String())
	}
	var err error
	f.Interfaces, err = wire.Interfaces(nil)
	return f, err
}

func (s *service) hostFacts() []*ingotv1.HeardHost {
	var all []*ingotv1.HeardHost
	for _, f := range s.guests.facts() {
		h := &ingotv1.HeardHost{Name: f.Host, Heard: f.Heard, Error: text(f.Problem), Microvms: int32(f.Guests)}
		if !f.Heard {
			h.Silent = since(f.Since)
		}
		all = append(all, h)
	}
	return all
}

func (s *service) dhcpFacts() *ingotv1.DHCPFacts {
	d := s.dhcp.Facts()
	f := &ingotv1.DHCPFacts{
		Serving: d.Serving, Error: text(d.Error), Interface: s.c.Interface, Subnet: s.c.Subnet.Masked().String(),
		RangeFirst: s.c.First.String(), RangeLast: s.c.Last.String(),
		DefaultLease: durationpb.New(d.DefaultLease), MaxLease: durationpb.New(d.MaxLease),
		ConfigFile: dhcpConfigFile, LeasesFile: leasesFile, DefaultsFile: dhcpDefaultsFile,
		Active: int32(d.Active), Free: int32(d.Free), Config: d.Config,
		Conflicts: d.Conflicts, SinceConflict: since(d.LastConflict), Exhausted: d.Exhausted, SinceExhausted: since(d.LastExhausted),
	}
	for _, r := range d.Ranges {
		f.Ranges = append(f.Ranges, fmt.Sprintf("%s-%s", r.First, r.Last))
	}
	for _, other := range d.Foreign {
		shown := &ingotv1.ForeignDHCP{Server: other.Server.String(), Mac: other.MAC.String(), Since: since(other.Seen)}
		if other.Offers.IsValid() {
			shown.Offers = other.Offers.String()
		}
		f.Foreign = append(f.Foreign, shown)
	}
	return f
}

// since is how long ago something was, and unset if it never was.
func since(at time.Time) *durationpb.Duration {
	if at.IsZero() {
		return nil
	}
	return durationpb.New(time.Since(at))
}

func (s *service) natFacts(ctx context.Context) *ingotv1.NATFacts {
	f := &ingotv1.NATFacts{Inside: s.c.Interface, Outside: s.c.Uplink}
	in, err := nat.Forwarding(s.c.Interface)
	out, err2 := nat.Forwarding(s.c.Uplink)
	f.Forwarding = in && out && errors.Join(err, err2) == nil
	rules, err := nat.CheckHub(s.rules(s.access.wanted()))
	if err != nil {
		s.log.Error("read NAT rules", "err", err)
	}
	for _, r := range rules {
		f.Rules = append(f.Rules, &ingotv1.NATRule{Rule: r.Text, Present: r.Present})
		if !r.Present {
			f.Missing = append(f.Missing, r.Text)
		}
	}
	others, err := s.c.inTheWay(ctx)
	if err != nil {
		s.log.Error("look at others' rules", "err", err)
	}
	f.Missing = append(f.Missing, others...)
	return f
}

func (s *service) registryFacts(ctx context.Context) *ingotv1.RegistryFacts {
	f := &ingotv1.RegistryFacts{Serving: true, Address: netip.AddrPortFrom(s.c.Address, RegistryPort).String(), Dir: s.c.Registry}
	r, err := s.registry.Facts(ctx)
	if err != nil {
		f.Serving, f.Error = false, err.Error()
		return f
	}
	for _, repository := range r.Repositories {
		f.Repositories = append(f.Repositories, repository.Name)
	}
	slices.Sort(f.Repositories)
	return f
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
