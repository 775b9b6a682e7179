package dhcp

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Seek asks the segment of an interface who serves addresses there, until ctx
// ends, and returns all but own. It takes no address. It needs no server of ours,
// and disturbs none.
func Seek(ctx context.Context, iface string, own netip.Addr) ([]Foreign, error) {
	card, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("seek DHCP servers: %s: %w", iface, err)
	}
	wire := &sockets{iface: card, own: from(own), raw: -1}
	defer wire.Close()
	if wire.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("seek DHCP servers: %w", err)
	}
	if wire.client, err = listenPackets(card, unix.ETH_P_IP, toClients); err != nil {
		return nil, fmt.Errorf("seek DHCP servers: %w", err)
	}
	for _, k := range []kind{kindInform, kindDiscover} {
		if err := wire.sendFrame(broadcastMAC, unix.ETH_P_IP, question(k, card.HardwareAddr, wire.own)); err != nil {
			return nil, fmt.Errorf("seek DHCP servers: %w", err)
		}
	}
	var all []Foreign
	err = packets(ctx, card, wire.client, func(frame []byte) {
		server, offered := serverOf(frame)
		if server == 0 || server == wire.own || len(all) >= maxForeign {
			return
		}
		i := slices.IndexFunc(all, func(f Foreign) bool { return f.Server == server.netip() })
		if i < 0 {
			i = len(all)
			all = append(all, Foreign{Server: server.netip(), MAC: slices.Clone(net.HardwareAddr(frame[6:12]))})
		}
		all[i].Offers, all[i].Seen = cmp.Or(offered.netip(), all[i].Offers), time.Now()
	})
	return all, err
}
