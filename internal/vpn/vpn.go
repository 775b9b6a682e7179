// Package vpn lets peers, operators' devices, into the segment: by WireGuard of the
// kernel's where it has that, else by wireguard-go on a tun device in this process,
// with the same configuration. It is the only package that speaks WireGuard. It owns
// the interface, the hub's key, and who the peers are, on disk; it makes no rules of
// who reaches what, and knows no private key of a peer's.
package vpn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"ingot/internal/link"
)

// Config is what an interface is to be.
type Config struct {
	Key     PrivateKey
	Address netip.Prefix // the interface's own, with the subnet of the peers
	Port    uint16       // UDP
	Peers   []Peer
}

// Peer is a device that may come in.
type Peer struct {
	Name    string     `json:"name"`
	Key     Key        `json:"public_key"`
	Address netip.Addr `json:"address"` // the only one that it may send from
	Added   time.Time  `json:"added"`
}

// Device is a WireGuard interface.
type Device struct {
	name string
	ctl  *wgctrl.Client
	user *userspace // nil: it is the kernel's
}

// Open makes an interface, or takes over the kernel's that is there. It does nothing
// before Set. It lasts until Close, whatever becomes of ctx.
func Open(ctx context.Context, name string, log *slog.Logger) (*Device, error) {
	ctl, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("open WireGuard: %w", err)
	}
	d := &Device{name: name, ctl: ctl}
	err = link.EnsureWireGuard(name)
	if errdefs.IsNotImplemented(err) {
		d.user, err = openUserspace(ctx, name, log)
	}
	if err != nil {
		ctl.Close()
		return nil, err
	}
	return d, nil
}

// Kernel says whether packets go by the kernel's WireGuard.
func (d *Device) Kernel() bool { return d.user == nil }

// Set makes the interface what c says, and changes nothing of what is so already:
// peers that stay don't notice.
func (d *Device) Set(c Config) (changed bool, err error) {
	have, err := d.ctl.Device(d.name)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", d.name, err)
	}
	if diff, differs := difference(have, c); differs {
		changed = true
		if err := d.ctl.ConfigureDevice(d.name, diff); err != nil {
			return changed, fmt.Errorf("configure %s, UDP port %d: %w", d.name, c.Port, err)
		}
	}
	did, err := link.SetAddress(d.name, c.Address)
	if err != nil {
		return changed, err
	}
	if err := link.Up(d.name); err != nil {
		return changed, fmt.Errorf("%w (UDP port %d)", err, c.Port)
	}
	was, err := link.Sysctl(d.name, "forwarding", "1")
	return changed || did || was == "0", err
}

// difference is what leads from what an interface is to what it is to be.
func difference(have *wgtypes.Device, c Config) (diff wgtypes.Config, differs bool) {
	if have.PrivateKey != c.Key.key {
		diff.PrivateKey, differs = &c.Key.key, true
	}
	if port := int(c.Port); have.ListenPort != port {
		diff.ListenPort, differs = &port, true
	}
	known := map[wgtypes.Key]wgtypes.Peer{}
	for _, p := range have.Peers {
		known[p.PublicKey] = p
		if !slices.ContainsFunc(c.Peers, func(want Peer) bool { return wgtypes.Key(want.Key) == p.PublicKey }) {
			diff.Peers = append(diff.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, Remove: true})
		}
	}
	for _, want := range c.Peers {
		address := net.IPNet{IP: want.Address.AsSlice(), Mask: net.CIDRMask(32, 32)}
		has, ok := known[wgtypes.Key(want.Key)]
		if ok && len(has.AllowedIPs) == 1 && has.AllowedIPs[0].String() == address.String() && has.PresharedKey == (wgtypes.Key{}) {
			continue
		}
		diff.Peers = append(diff.Peers, wgtypes.PeerConfig{
			PublicKey: wgtypes.Key(want.Key), PresharedKey: &wgtypes.Key{}, ReplaceAllowedIPs: true, AllowedIPs: []net.IPNet{address},
		})
	}
	return diff, differs || len(diff.Peers) > 0
}

// Traffic is what an interface knows of a peer.
type Traffic struct {
	Endpoint       netip.AddrPort // where it was heard from last; zero: nowhere
	Handshake      time.Time      // the last one; zero: none
	Received, Sent int64          // bytes
}

// Traffic is that of all peers.
func (d *Device) Traffic() (map[Key]Traffic, error) {
	have, err := d.ctl.Device(d.name)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.name, err)
	}
	all := map[Key]Traffic{}
	for _, p := range have.Peers {
		t := Traffic{Handshake: p.LastHandshakeTime, Received: p.ReceiveBytes, Sent: p.TransmitBytes}
		if p.Endpoint != nil {
			at := p.Endpoint.AddrPort()
			t.Endpoint = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
		}
		all[Key(p.PublicKey)] = t
	}
	return all, nil
}

// Greet has an interface that has just begun speak to peers where they were heard from
// last. They don't know that it knows nothing of them any more: alone they find out
// after 15 seconds without an answer (KEEPALIVE-TIMEOUT and REKEY-TIMEOUT of WireGuard).
func (d *Device) Greet(places map[Key]netip.AddrPort) error {
	have, err := d.ctl.Device(d.name)
	if err != nil {
		return fmt.Errorf("read %s: %w", d.name, err)
	}
	var on, off wgtypes.Config
	for _, p := range have.Peers {
		at, ok := places[Key(p.PublicKey)]
		if !ok {
			continue
		}
		// One that is switched on is sent at once, and begins with a handshake.
		keepalive, never := time.Minute, time.Duration(0)
		on.Peers = append(on.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, UpdateOnly: true, Endpoint: net.UDPAddrFromAddrPort(at), PersistentKeepaliveInterval: &keepalive})
		off.Peers = append(off.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, UpdateOnly: true, PersistentKeepaliveInterval: &never})
	}
	if len(on.Peers) == 0 {
		return nil
	}
	if err := errors.Join(d.ctl.ConfigureDevice(d.name, on), d.ctl.ConfigureDevice(d.name, off)); err != nil {
		return fmt.Errorf("greet peers of %s: %w", d.name, err)
	}
	return nil
}

// Gone is closed when the interface is no more. Of the kernel's nobody tells.
func (d *Device) Gone() <-chan struct{} {
	if d.user == nil {
		return nil
	}
	return d.user.device.Wait()
}

// Close lets go of the interface. One of the kernel's stays, and its peers with it.
func (d *Device) Close() error {
	if d.user != nil {
		d.user.close()
	}
	return d.ctl.Close()
}
