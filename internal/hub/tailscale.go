package hub

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/logfile"
	"ingot/internal/nat"
	"ingot/internal/run"
	"ingot/internal/tailscale"
)

// Tailscale is how the hub is a subnet router of a tailnet.
type Tailscale struct {
	Server   string `yaml:"login-server,omitempty"` // empty: Tailscale's own
	Hostname string `yaml:"hostname"`               // the hub's, in the tailnet
}

// check finds fault with a hub in a tailnet, whose peers must be told from all others.
func (t Tailscale) check(c Config) error {
	if t.Hostname == "" {
		return errors.New("tailscale: hostname: it is missing")
	}
	type network struct {
		field  string
		prefix netip.Prefix
	}
	others := []network{{"subnet", c.Subnet}, {"trusted", c.Trusted}}
	if c.VPN != nil {
		others = append(others, network{"vpn: subnet", c.VPN.Subnet})
	}
	for _, n := range c.DHCP.Subnets {
		others = append(others, network{"dhcp: subnets", n.Prefix})
	}
	for _, n := range others {
		if n.prefix.IsValid() && n.prefix.Overlaps(tailscale.Addresses) {
			return fmt.Errorf("%s: %s overlaps with %s, which tailnets give their peers", n.field, n.prefix, tailscale.Addresses)
		}
	}
	return nil
}

// TailscaleKey is what lets the hub into the tailnet.
const TailscaleKey = "/etc/ingot/tailscale-key"

// What tailscaled keeps, and its log.
const (
	tailscaleDir = "/var/lib/ingot/tailscale"
	tailscaleLog = "/var/lib/ingot/log/tailscaled.log"
)

func (h *Hub) newTailnet() *tailscale.Router {
	t := h.c.Tailscale
	return tailscale.New(tailscale.Settings{
		Dir: tailscaleDir, LogFile: tailscaleLog, KeyFile: TailscaleKey, Server: t.Server, Hostname: t.Hostname,
		Route: h.c.Subnet.Masked(), Log: h.log,
		Forward: func(name string) error {
			_, err := nat.SetForwarding(name, true)
			return err
		},
	})
}

// tailnetTasks are what the hub does for Tailscale, or for there to be none.
func (h *Hub) tailnetTasks() []run.Task {
	if h.tailnet != nil {
		return []run.Task{h.tailnet, run.Func("log of tailscaled", h.boundTailscaleLog)}
	}
	if _, err := os.Stat(tailscaleDir); errors.Is(err, os.ErrNotExist) {
		if err := remove(TailscaleKey); err != nil {
			h.log.Warn("a key for Tailscale stays, which nobody needs", "err", err)
		}
		return nil
	}
	return []run.Task{run.Func("leave the tailnet", h.leaveTailnet)}
}

// boundTailscaleLog keeps tailscaled's log short. Where that can't be, it grows.
func (h *Hub) boundTailscaleLog(ctx context.Context, ready func()) error {
	ready()
	err := makeDir(filepath.Dir(tailscaleLog), 0o700)
	if err == nil {
		var k *logfile.Keeper
		if k, err = logfile.Open([]string{".log"}, h.log); err == nil {
			if err = k.Add(filepath.Dir(tailscaleLog)); err == nil {
				err = k.Run(ctx)
			}
		}
	}
	if ctx.Err() == nil {
		h.log.Warn("the log of tailscaled is not bounded", "err", err)
	}
	<-ctx.Done()
	return nil
}

// leaveTailnet logs the hub out, which was in a tailnet before. Nothing waits for that: it
// needs others.
func (h *Hub) leaveTailnet(ctx context.Context, ready func()) error {
	ready()
	// The key first: the next one may come while the tailnet is still being spoken with.
	err := errors.Join(remove(TailscaleKey), tailscale.Forget(ctx, tailscaleDir, tailscaleLog))
	if ctx.Err() != nil {
		return nil // the next hub does it, or is in the tailnet again
	}
	if err = errors.Join(err, remove(filepath.Dir(tailscaleLog))); err != nil {
		h.log.Warn("leave the tailnet", "err", err)
	} else {
		h.log.Info("the tailnet was left")
	}
	<-ctx.Done()
	return nil
}

func (s *service) tailscaleFacts(ctx context.Context) *ingotv1.TailscaleFacts {
	if s.tailnet == nil {
		return nil
	}
	f := s.tailnet.Facts(ctx)
	m := &ingotv1.TailscaleFacts{
		Serving: f.Error == nil, Error: text(f.Error), Version: f.Version, State: f.State, Name: f.Name, Addresses: texts(f.Addresses),
		LoginServer: f.Server, Expired: f.Expired, Route: s.c.Subnet.Masked().String(), Advertised: f.Advertised, Approved: f.Approved,
		Userspace: f.Userspace, Peers: int32(f.Peers), Socket: tailscale.Socket,
	}
	if !f.Expires.IsZero() {
		m.Expires = timestamppb.New(f.Expires)
	}
	return m
}
