package env

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"

	"ingot/internal/pki"
	"ingot/internal/tailscale"
)

// Tailscale is how the hub is a subnet router of a tailnet; zero: it is none.
type Tailscale struct {
	KeyFile  string // what lets it in, on the machine that `up` runs on
	Server   string // where it logs in; empty: Tailscale's own
	Hostname string // the hub's, in the tailnet
}

// On says whether it is one.
func (t Tailscale) On() bool { return t.KeyFile != "" }

func (t Tailscale) String() string {
	s := fmt.Sprintf("the hub is %s, with the key in %s", t.Hostname, t.KeyFile)
	if t.Server != "" {
		s += ", at " + t.Server
	}
	return s
}

// tailscale reads the section. A file is beside the one that names it.
func (r *reader) tailscale(n *yaml.Node, key string, d *Declaration) {
	d.Tailscale = &Tailscale{}
	r.mapping(n, key, fields{
		"auth_key_file": func(n *yaml.Node, key string) {
			path := r.text(n, key)
			if path != "" && !filepath.IsAbs(path) {
				path = filepath.Join(filepath.Dir(r.file), path)
			}
			if abs, err := filepath.Abs(path); path != "" && err == nil {
				d.Tailscale.KeyFile = abs
			}
		},
		"login_server": func(n *yaml.Node, key string) {
			text := r.text(n, key)
			if u, err := url.Parse(text); text != "" && (err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil) {
				r.add(key, "%q is not a server's URL, such as https://headscale.example.org", text)
				return
			}
			d.Tailscale.Server = strings.TrimSuffix(text, "/")
		},
		"hostname": func(n *yaml.Node, key string) {
			if d.Tailscale.Hostname = r.text(n, key); d.Tailscale.Hostname != "" && !validHostname.MatchString(d.Tailscale.Hostname) {
				r.add(key, "%q is not a machine's name: %s", d.Tailscale.Hostname, hostnameRule)
			}
		},
	})
}

func (d *Declaration) checkTailscale(m *mistakes) {
	if d.Tailscale == nil {
		return
	}
	if !d.has("tailscale.auth_key_file") {
		m.add("tailscale", "it has no auth_key_file: a file with an auth key, which the tailnet's administrator makes")
	}
	for _, net := range []struct {
		key string
		p   netip.Prefix
	}{{"subnet", d.Subnet}, {"uplink", d.Uplink}, {"vpn.subnet", d.vpnSubnet()}} {
		if net.p.IsValid() && net.p.Overlaps(tailscale.Addresses) {
			m.add(net.key, "%s overlaps with %s, which tailnets give their peers", net.p, tailscale.Addresses)
		}
	}
}

// usualUplink is what is taken where a file says nothing. A tailnet's own addresses can't be.
func (d *Declaration) usualUplink() netip.Prefix {
	if d.Tailscale != nil {
		return netip.MustParsePrefix("172.31.254.0/30")
	}
	return usualUplink
}

// resolveTailscale decides what is left open, and objects to an environment that stands
// in the way.
func (d *Declaration) resolveTailscale(m *mistakes, e Env) Tailscale {
	t := *d.Tailscale
	t.Hostname = cmp.Or(t.Hostname, d.Hub())
	for _, p := range append(e.networks(), d.DHCP.relayed()...) {
		if p.Overlaps(tailscale.Addresses) && len(m.all) == 0 {
			m.add("tailscale", "the environment has %s, and tailnets give %s to their peers: `ingot down` first, and leave uplink out or say another", p, tailscale.Addresses)
		}
	}
	return t
}

// tailscaleObjections are a key that can't be read, and programs that are not there.
func (u *up) tailscaleObjections() (o Objections) {
	if !u.env.Tailscale.On() {
		return nil
	}
	if names := tailscale.Missing(); len(names) > 0 {
		o = append(o, refuse(errdefs.ErrFailedPrecondition, "tailscale: this machine has no %s: install the package tailscale, see https://tailscale.com/download/linux", strings.Join(names, " and no ")))
	}
	if u.Declared == nil {
		return o // the hub has the key
	}
	const most = 1 << 12
	b, err := os.ReadFile(u.env.Tailscale.KeyFile)
	switch words := strings.Fields(string(b)); {
	case err != nil:
		o = append(o, u.Declared.mistake("tailscale.auth_key_file", "%v", err))
	case len(words) != 1 || len(b) > most:
		o = append(o, u.Declared.mistake("tailscale.auth_key_file", "%s has %d words in it, and is to have an auth key alone", u.env.Tailscale.KeyFile, len(words)))
	default:
		u.authKey = pki.Secret(words[0])
	}
	return o
}

// leaveTailnet has the tailnet forget the hub of an environment that is going. What can't be
// reached is told, and stops nothing.
func leaveTailnet(ctx context.Context, name, binary string, out io.Writer) {
	e, err := Open(name)
	if err != nil || !e.Tailscale.On() || !e.Lab(binary).Up() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if said, err := e.Lab(binary).Command(ctx, e.Hub().Name, "tailscale", "logout").CombinedOutput(); err != nil {
		fmt.Fprintf(out, "note: the tailnet may still show %s: tailscale logout: %v: %s\n", e.Tailscale.Hostname, err, strings.TrimSpace(string(said)))
	}
}
