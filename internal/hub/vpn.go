package hub

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/link"
	"ingot/internal/vpn"
)

// errNoVPN is what is said of peers where they can't come in.
var errNoVPN = fmt.Errorf("this environment has no VPN: add the line `vpn: {}` to its file, and `ingot up -f` it: %w", errdefs.ErrFailedPrecondition)

func (s *service) AddVPNPeer(_ context.Context, r *ingotv1.AddVPNPeerRequest) (*ingotv1.AddVPNPeerResponse, error) {
	if s.vpn == nil {
		return nil, errNoVPN
	}
	key, err := vpn.ParseKey(r.GetPublicKey())
	if err != nil {
		return nil, fmt.Errorf("public_key: %w", err)
	}
	endpoint, err := s.endpoint()
	if err != nil {
		return nil, err
	}
	p, err := s.vpn.Add(r.GetName(), key)
	if err != nil {
		return nil, err
	}
	f := s.vpn.Facts()
	return &ingotv1.AddVPNPeerResponse{
		Peer: peer(vpn.PeerFacts{Peer: p}), PublicKey: f.Key.String(), Endpoint: endpoint, Dns: s.c.Address.String(), Domain: s.c.Domain,
		AllowedIps: []string{s.c.Subnet.Masked().String(), netip.PrefixFrom(f.Address.Addr(), 32).String()},
	}, nil
}

func (s *service) RemoveVPNPeer(_ context.Context, r *ingotv1.RemoveVPNPeerRequest) (*emptypb.Empty, error) {
	if s.vpn == nil {
		return nil, errNoVPN
	}
	return &emptypb.Empty{}, s.vpn.Remove(r.GetName())
}

func (s *service) ListVPNPeers(context.Context, *ingotv1.ListVPNPeersRequest) (*ingotv1.ListVPNPeersResponse, error) {
	if s.vpn == nil {
		return nil, errNoVPN
	}
	f := s.vpn.Facts()
	if f.Error != nil {
		return nil, fmt.Errorf("list peers: the VPN does not serve: %w: %w", f.Error, errdefs.ErrUnavailable)
	}
	return &ingotv1.ListVPNPeersResponse{Peers: peers(f)}, nil
}

// endpoint is where peers find the hub: what the configuration says, else its uplink.
func (h *Hub) endpoint() (string, error) {
	if h.c.VPN.Endpoint != "" {
		return h.c.VPN.Endpoint, nil
	}
	i, err := link.Get(h.c.Uplink)
	if err != nil {
		return "", err
	}
	for _, p := range i.Addresses {
		if p.Addr().Is4() {
			return netip.AddrPortFrom(p.Addr(), h.c.VPN.Port).String(), nil
		}
	}
	return "", errors.New("the uplink has no address that peers could be told: `vpn: {endpoint: HOST}` in the environment's file says one")
}

func peer(p vpn.PeerFacts) *ingotv1.VPNPeer {
	m := &ingotv1.VPNPeer{
		Name: p.Name, PublicKey: p.Key.String(), Address: p.Address.String(), Added: timestamppb.New(p.Added),
		ReceivedBytes: p.Received, SentBytes: p.Sent, Outside: p.Outside,
	}
	if p.Endpoint.IsValid() {
		m.Endpoint = p.Endpoint.String()
	}
	if !p.Handshake.IsZero() {
		m.Handshake = timestamppb.New(p.Handshake)
	}
	return m
}

func peers(f vpn.Facts) []*ingotv1.VPNPeer {
	var all []*ingotv1.VPNPeer
	for _, p := range f.Peers {
		all = append(all, peer(p))
	}
	return all
}

func (s *service) vpnFacts() *ingotv1.VPNFacts {
	if s.vpn == nil {
		return nil
	}
	f := s.vpn.Facts()
	m := &ingotv1.VPNFacts{
		Serving: f.Error == nil, Error: text(f.Error), Implementation: "wireguard-go", Interface: f.Interface, Address: f.Address.String(),
		Port: uint32(f.Port), PublicKey: f.Key.String(), Peers: peers(f),
	}
	if f.Kernel {
		m.Implementation = "kernel"
	}
	m.Endpoint, _ = s.endpoint()
	return m
}
