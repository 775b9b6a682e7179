package vpn

import (
	"fmt"
	"net/netip"
	"strings"
)

// Client is what a peer's device is to be told.
type Client struct {
	Comment  string     // empty: none
	Key      PrivateKey // zero: the device has one already
	Public   Key        // that it belongs to
	Address  netip.Addr
	DNS      []string // name servers, and domains to look in; empty: the device's own
	Server   Key
	Endpoint string // HOST:PORT
	Routes   []netip.Prefix
}

// keepalive keeps a way open through the routers of homes and hotels, which forget a
// silent one after half a minute.
const keepalive = 25

// Config is the file that wg-quick(8) and WireGuard's apps read.
func (c Client) Config() string {
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	if c.Comment != "" {
		line("# %s", c.Comment)
	}
	line("[Interface]")
	if c.Key == (PrivateKey{}) {
		line("# PrivateKey = the one whose public key is %s", c.Public)
	} else {
		line("PrivateKey = %s", c.Key.Text())
	}
	line("Address = %s/32", c.Address)
	if len(c.DNS) > 0 {
		line("DNS = %s", strings.Join(c.DNS, ", "))
	}
	var routes []string
	for _, r := range c.Routes {
		routes = append(routes, r.String())
	}
	line("\n[Peer]")
	line("PublicKey = %s", c.Server)
	line("Endpoint = %s", c.Endpoint)
	line("AllowedIPs = %s", strings.Join(routes, ", "))
	line("PersistentKeepalive = %d", keepalive)
	return b.String()
}
