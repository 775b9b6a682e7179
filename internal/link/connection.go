package link

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// CutConnections has the kernel forget the connections of a protocol that were opened to
// an address of this machine, zero for any, and a port, and that go to another instead.
// What comes of them after that is new.
func CutConnections(protocol byte, at netip.Addr, port uint16, to netip.AddrPort) error {
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, flow{protocol, at, port, to})
	if err != nil {
		return fmt.Errorf("forget connections to %s: %w", to, err)
	}
	return nil
}

// flow is which connections are meant.
type flow struct {
	protocol byte
	at       netip.Addr
	port     uint16
	to       netip.AddrPort
}

func (f flow) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	at, _ := netip.AddrFromSlice(c.Forward.DstIP)
	to, _ := netip.AddrFromSlice(c.Reverse.SrcIP)
	return c.Forward.Protocol == f.protocol && c.Forward.DstPort == f.port && (!f.at.IsValid() || at.Unmap() == f.at) &&
		netip.AddrPortFrom(to.Unmap(), c.Reverse.SrcPort) == f.to
}
