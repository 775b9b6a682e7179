package env

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"ingot/internal/hub"
	"ingot/internal/lab"
	"ingot/internal/pki"
	"ingot/internal/vpn"
)

// keep makes the environment's directory, with its file: from now on an `up`
// without a file goes on with what this one has begun.
func (u *up) keep(context.Context) (string, error) {
	// What a `down` that was killed has left.
	if err := os.RemoveAll(u.env.aside()); err != nil {
		return "", err
	}
	if err := os.MkdirAll(u.env.Dir(), 0o700); err != nil {
		return "", err
	}
	var err error
	switch {
	case u.Declared != nil, u.NoVMs: // somebody said which microVMs there are to be
		err = removeIfThere(u.pendingPath())
	case u.was == nil:
		err = writeFile(u.pendingPath(), nil)
	}
	if err != nil {
		return "", err
	}
	b, err := u.env.marshal()
	if err != nil {
		return "", err
	}
	path := filepath.Join(u.env.Dir(), fileName)
	if have, err := os.ReadFile(path); err != nil || string(have) != string(b) {
		if err := u.env.save(); err != nil {
			return "", err
		}
	}
	err = u.choice.Release()
	u.choice = nil
	return path, err
}

// makeCertificates makes the CA, a certificate for each machine and one for the
// operator, and the token, as far as they are not there.
func (u *up) makeCertificates(context.Context) (string, error) {
	ca, err := pki.OpenCA(filepath.Join(u.env.Dir(), "ca"), "ingot environment "+u.env.Name)
	if err != nil {
		return "", err
	}
	if _, err := ca.Ensure(filepath.Join(u.env.Dir(), "client"), "operator", nil, nil); err != nil {
		return "", err
	}
	for _, m := range u.env.Machines {
		dir := filepath.Join(u.env.Dir(), "machines", m.Name, pkiDir)
		if _, err := ca.Ensure(dir, m.Name, []string{m.Name, "localhost"}, []netip.Addr{m.Address, netip.MustParseAddr("127.0.0.1")}); err != nil {
			return "", err
		}
	}
	u.token, err = u.env.Token()
	if errors.Is(err, os.ErrNotExist) {
		u.token = pki.NewToken()
		err = writeFile(filepath.Join(u.env.Dir(), "token"), []byte(u.token))
	}
	return "CA, machines, operator, token", err
}

func (u *up) makeMachines(ctx context.Context) (string, error) {
	_, err := u.lab.Ensure(ctx)
	if err == nil {
		if err := u.lab.TellFirewalld(ctx); err != nil {
			u.say("note: microVMs may reach nothing beyond this machine: %v", err)
		}
	}
	var names []string
	for _, m := range u.env.Machines {
		names = append(names, m.Name)
	}
	return strings.Join(names, ", "), err
}

// file is one that a machine is given.
type file struct {
	path string
	text []byte
}

// files are a machine's configuration.
func (u *up) files(ctx context.Context, m Machine) ([]file, error) {
	files := []file{{tokenFile, []byte(u.token)}}
	add := func(path string, v any) error {
		b, err := yaml.Marshal(v)
		files = append(files, file{path, b})
		return err
	}
	if m.Hub {
		if err := add(hubFile, u.hubConfig(ctx, m)); err != nil {
			return nil, err
		}
		if u.authKey != "" {
			files = append(files, file{hub.TailscaleKey, []byte(u.authKey)})
		}
	}
	if m.Host {
		if err := add(hostFile, u.hostConfig(m)); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// configure writes each machine's configuration.
func (u *up) configure(ctx context.Context) (string, error) {
	changed := 0
	for _, m := range u.env.Machines {
		files, err := u.files(ctx, m)
		if err != nil {
			return "", err
		}
		for _, f := range files {
			did, err := u.lab.WriteFile(m.Name, f.path, f.text, 0o600)
			if err != nil {
				return "", err
			}
			if did {
				changed++
			}
		}
	}
	if _, err := u.env.upstreams(); err != nil {
		u.say("note: guests will resolve names of the environment only: %v", err)
	}
	return fmt.Sprintf("%d files changed", changed), nil
}

func (u *up) hubConfig(ctx context.Context, m Machine) hub.Config {
	c := hub.Default()
	c.Address, c.Subnet, c.Trusted = m.Address, u.env.Subnet, u.env.Uplink
	c.DHCP = u.env.DHCP.DHCP
	c.First, c.Last, c.DHCP.Ranges = c.DHCP.Ranges[0].First, c.DHCP.Ranges[0].Last, c.DHCP.Ranges[1:]
	c.Domain, c.Metrics = u.env.Name+".internal", netip.AddrPortFrom(m.Address, hub.OwnMetrics)
	for _, other := range u.env.Machines {
		c.Machines = append(c.Machines, hub.Machine{Name: other.Name, Address: other.Address, Host: other.Host})
	}
	if v := u.env.VPN; v.On() {
		c.VPN = &hub.VPN{Subnet: v.Subnet, Port: v.Port, Endpoint: v.endpoint(ctx)}
	}
	if t := u.env.Tailscale; t.On() {
		c.Tailscale = &hub.Tailscale{Server: t.Server, Hostname: t.Hostname}
	}
	c.Reservations = u.env.reservations()
	c.Upstreams, _ = u.env.upstreams() // configure says what it means if there are none
	return c
}

// hostConfig is flintlock's configuration, with our keys.
func (u *up) hostConfig(m Machine) any {
	var platform []netip.Addr
	for _, other := range u.env.Machines {
		platform = append(platform, other.Address)
	}
	// Not the hub's end of its uplink: published ports are there, for guests as well, and
	// who may have what else of it the hub's own rules say.
	platform = append(platform, u.lab.RootEnd())
	if u.env.VPN.On() {
		platform = append(platform, vpn.Address(u.env.VPN.Subnet).Addr())
	}
	c := yaml.MapSlice{
		{Key: "grpc-endpoint", Value: netip.AddrPortFrom(m.Address, hub.HostPort).String()},
		{Key: "tls-cert", Value: "/etc/ingot/pki/cert.pem"},
		{Key: "tls-key", Value: "/etc/ingot/pki/key.pem"},
		{Key: "tls-client-validate", Value: true},
		{Key: "tls-client-ca", Value: "/etc/ingot/pki/ca.pem"},
		{Key: "token-file", Value: "/etc/ingot/token"},
		{Key: "bridge-name", Value: lab.Bridge},
		{Key: "default-registry", Value: u.env.RegistryAddress()},
		{Key: "registry-ca", Value: "/etc/ingot/pki/ca.pem"},
		{Key: "metrics-endpoint", Value: netip.AddrPortFrom(m.Address, hub.MetricsPort).String()},
		{Key: "segment", Value: lab.Segment},
		{Key: "segment-port", Value: lab.Port},
		{Key: "machines", Value: platform},
		{Key: "hub", Value: u.env.Hub().Address},
		{Key: "trusted", Value: u.env.Uplink},
		{Key: "enable-exec-api", Value: true}, // as well kept as Ingot's own
		{Key: "enable-ssh-proxy-api", Value: true},
	}
	if !m.Hub { // which a macvtap guest of its own can't reach: it gets a tap
		c = append(c, yaml.MapItem{Key: "parent-iface", Value: lab.Segment})
	}
	if u.env.VPN.On() {
		c = append(c, yaml.MapItem{Key: "vpn", Value: u.env.VPN.Subnet})
	}
	return c
}

func (u *up) startRoles(ctx context.Context) (string, error) {
	count := 0
	for _, m := range u.lab.Machines {
		count += len(m.Roles)
	}
	return fmt.Sprintf("%d processes, supervised", count), u.lab.Start(ctx)
}
