package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/dhcp"
)

// importedFile is the configuration of the isc-dhcp-server whose place the hub took.
const importedFile = "/var/lib/ingot/dhcp/imported.conf"

// beside is what the hub serves, with what a dhcpd.conf has.
func (h *Hub) beside(text string) (dhcp.Config, []dhcp.Left, error) {
	c, err := h.dhcpConfig()
	if err != nil || text == "" {
		return c, nil, err
	}
	d, err := dhcp.ParseDhcpd(text)
	c, left := c.With(d)
	return c, left, err
}

// imported is the text of what was imported; nothing is fine.
func imported() (string, error) {
	b, err := os.ReadFile(importedFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read imported configuration: %w", err)
	}
	return string(b), nil
}

func (s *service) ImportLeases(_ context.Context, r *ingotv1.ImportLeasesRequest) (*ingotv1.ImportLeasesResponse, error) {
	all := make([]dhcp.Lease, len(r.GetLeases()))
	for i, l := range r.GetLeases() {
		ip, err := netip.ParseAddr(l.GetIp())
		if err != nil {
			return nil, fmt.Errorf("leases: ip: %q is not an address: %w", l.GetIp(), errdefs.ErrInvalidArgument)
		}
		all[i] = dhcp.Lease{
			IP: ip, ClientID: l.GetClientId(), Hostname: l.GetHostname(), MicroVM: l.GetMicrovm(), State: l.GetState(), Starts: l.GetStarts().AsTime(), Ends: l.GetEnds().AsTime(),
		}
		if l.GetMac() == "" {
			continue
		}
		if all[i].MAC, err = net.ParseMAC(l.GetMac()); err != nil || len(all[i].MAC) != 6 {
			return nil, fmt.Errorf("leases: mac: %q is not a MAC address: %w", l.GetMac(), errdefs.ErrInvalidArgument)
		}
	}
	left, err := s.dhcp.Take(all)
	if err != nil {
		return nil, err
	}
	var said ingotv1.ImportLeasesResponse
	for _, l := range left {
		said.Left = append(said.Left, &ingotv1.NotImported{Ip: l.IP.String(), Mac: l.MAC.String(), Reason: l.Why.Error()})
	}
	return &said, nil
}

func (s *service) WatchLeases(_ *ingotv1.WatchLeasesRequest, to grpc.ServerStreamingServer[ingotv1.LeaseEvent]) error {
	return s.dhcp.Watch(to.Context(), func(l dhcp.Lease, initial bool) error {
		return to.Send(&ingotv1.LeaseEvent{Lease: s.lease(l), Initial: initial})
	})
}

func (s *service) ConfigureDHCP(_ context.Context, r *ingotv1.ConfigureDHCPRequest) (*ingotv1.ConfigureDHCPResponse, error) {
	serves, left, err := s.beside(r.GetConfig())
	if err != nil {
		return nil, err
	}
	if _, err := dhcp.New(serves); err != nil {
		return nil, err
	}
	var said ingotv1.ConfigureDHCPResponse
	for _, l := range left {
		said.Left = append(said.Left, &ingotv1.LeftLine{Line: int32(l.Line), Text: l.Text, Reason: l.Why})
	}
	if old, err := imported(); err != nil || old == r.GetConfig() {
		return &said, err
	}
	if err := replace(importedFile, []byte(r.GetConfig())); err != nil {
		return nil, err
	}
	said.Changed = true
	select {
	case s.again <- struct{}{}:
	default:
	}
	return &said, nil
}

// answered is how long the hub goes on after it was told to start again, for its
// answer to be read.
const answered = 100 * time.Millisecond

// awaitConfig ends the hub when a new configuration has come: whoever started it
// starts it again, with that.
func (h *Hub) awaitConfig(ctx context.Context, ready func()) error {
	ready()
	select {
	case <-ctx.Done():
		return nil
	case <-h.again:
	}
	timer := time.NewTimer(answered)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-timer.C:
		return errors.New("there is a new one: it begins with the next start")
	}
}
