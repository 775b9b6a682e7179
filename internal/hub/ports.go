package hub

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/link"
	"ingot/internal/nat"
	"ingot/internal/tailscale"
)

func (s *service) PublishPorts(ctx context.Context, r *ingotv1.PublishPortsRequest) (*ingotv1.PublishPortsResponse, error) {
	ports, err := portsOf(r.GetPorts(), true)
	if err != nil {
		return nil, err
	}
	outside, err := s.outside()
	if err != nil {
		return nil, err
	}
	held := s.access.list()
	for _, p := range ports {
		if p.Address.IsValid() && !slices.Contains(outside, p.Address) {
			return nil, fmt.Errorf("publish %s: the hub has no such address outside: it has %v: %w", p, outside, errdefs.ErrInvalidArgument)
		}
		// What is published already was free, and is nobody's else.
		published := slices.ContainsFunc(held, func(x access) bool { return slices.Contains(x.Ports, p) })
		if err := s.needed(p); err != nil && !published {
			return nil, err
		}
	}
	if r.GetUid() == "" {
		err = collisions(append(s.access.refresh(held), access{Ports: ports}))
	} else {
		err = s.access.publish(ctx, r.GetUid(), ports, r.GetReplace())
	}
	if err != nil {
		return nil, err
	}
	return &ingotv1.PublishPortsResponse{Addresses: texts(outside)}, nil
}

func (s *service) UnpublishPorts(_ context.Context, r *ingotv1.UnpublishPortsRequest) (*emptypb.Empty, error) {
	ports, err := portsOf(r.GetPorts(), false)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.access.unpublish(r.GetUid(), ports)
}

func (s *service) ListPorts(context.Context, *ingotv1.ListPortsRequest) (*ingotv1.ListPortsResponse, error) {
	outside, err := s.outside()
	if err != nil {
		return nil, err
	}
	m := &ingotv1.ListPortsResponse{Addresses: texts(outside)}
	for _, one := range s.access.list() {
		for _, p := range one.Ports {
			shown := &ingotv1.PublishedPort{
				Port: &ingotv1.Port{Protocol: p.Protocol, Port: uint32(p.Port), To: uint32(p.To)},
				Uid:  one.Guest.UID, Namespace: one.Guest.Namespace, Name: one.Guest.Name,
			}
			if p.Address.IsValid() {
				shown.Port.Address = p.Address.String()
			}
			if one.Address.IsValid() {
				shown.GuestAddress = one.Address.String()
			}
			m.Ports = append(m.Ports, shown)
		}
	}
	slices.SortStableFunc(m.Ports, func(a, b *ingotv1.PublishedPort) int { return int(a.GetPort().GetPort()) - int(b.GetPort().GetPort()) })
	return m, nil
}

// portsOf reads ports. Of those that are taken away the microVM's side may be left out.
func portsOf(all []*ingotv1.Port, whole bool) ([]nat.Port, error) {
	var ports []nat.Port
	wrong := func(format string, a ...any) ([]nat.Port, error) {
		return nil, fmt.Errorf("ports: %w: %w", fmt.Errorf(format, a...), errdefs.ErrInvalidArgument)
	}
	for _, m := range all {
		if m.GetPort() > math.MaxUint16 || m.GetTo() > math.MaxUint16 || whole && m.GetTo() == 0 {
			return wrong("%d:%d is not from one port to another", m.GetPort(), m.GetTo())
		}
		p := nat.Port{Protocol: m.GetProtocol(), Port: uint16(m.GetPort()), To: uint16(m.GetTo())}
		if m.GetAddress() != "" {
			var err error
			if p.Address, err = netip.ParseAddr(m.GetAddress()); err != nil {
				return wrong("%q is not an address", m.GetAddress())
			}
		}
		if err := p.Check(); err != nil {
			return wrong("%w", err)
		}
		if i := slices.IndexFunc(ports, p.Collides); i >= 0 {
			return wrong("%s and %s are the same outside", ports[i], p)
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// outside are the hub's addresses that are not on the segment.
func (h *Hub) outside() ([]netip.Addr, error) {
	i, err := link.Get(h.c.Uplink)
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for _, p := range i.Addresses {
		if p.Addr().Is4() && !h.c.Subnet.Contains(p.Addr()) {
			all = append(all, p.Addr())
		}
	}
	return all, nil
}

func texts(all []netip.Addr) []string {
	var texts []string
	for _, a := range all {
		texts = append(texts, a.String())
	}
	return texts
}

// needed says what has a port of the hub's already; nil: nothing has.
func (h *Hub) needed(p nat.Port) error {
	own := map[string]string{
		"udp 53": "names", "tcp 53": "names", "udp 67": "DHCP", "udp 68": "DHCP",
		fmt.Sprint("tcp ", GRPCPort): "the hub's API", fmt.Sprint("tcp ", HostPort): "hosts' API",
		fmt.Sprint("tcp ", MetricsPort): "hosts' metrics", fmt.Sprint("tcp ", RegistryPort): "the registry",
	}
	if h.c.VPN != nil {
		own[fmt.Sprint("udp ", h.c.VPN.Port)] = "the VPN"
	}
	if h.c.Tailscale != nil {
		own[fmt.Sprint("udp ", tailscale.Port)] = "tailscaled"
	}
	what := own[fmt.Sprint(p.Protocol, " ", p.Port)]
	if what == "" && listensAt(p) {
		what = "something that listens on the hub"
	}
	if what == "" {
		return nil
	}
	return fmt.Errorf("publish %s: the port is that of %s: %w", p, what, errdefs.ErrFailedPrecondition)
}

// listensAt says whether somebody on this machine has a port.
func listensAt(p nat.Port) bool {
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), p.Port)
	if p.Address.IsValid() {
		at = netip.AddrPortFrom(p.Address, p.Port)
	}
	if p.Protocol == "udp" {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		if err == nil {
			c.Close()
		}
		return errors.Is(err, unix.EADDRINUSE)
	}
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if err == nil {
		l.Close()
	}
	return errors.Is(err, unix.EADDRINUSE)
}
