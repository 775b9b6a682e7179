package dhcp

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// Who answers has this time: dhcpd looks for a second whether an address is used
	// before it offers one.
	seekTime = 2 * time.Second
	seekStep = 200 * time.Millisecond // between the questions: one may be lost
)

// Seek asks the segment of an interface who serves addresses there, until ctx
// ends or for 2 s, and returns all but own. It takes no address. It needs no server of
// ours, and disturbs none.
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
	var all []Foreign
	err = wire.seek(ctx, func(f Foreign) {
		i := slices.IndexFunc(all, func(old Foreign) bool { return old.Server == f.Server })
		switch {
		case i >= 0:
			f.Offers = cmp.Or(f.Offers, all[i].Offers)
			all[i] = f
		case len(all) < maxForeign:
			all = append(all, f)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("seek DHCP servers: %w", err)
	}
	return all, nil
}

// seek asks the segment for an address, as a client would, and for options alone: whoever
// answers is another server, which heard is told. dhcpd answers the INFORM at once. What is
// offered is not taken. It hears what other servers say to their clients, too.
//
// The socket that sees those packets has the kernel copy all that come in, also what is only
// passed on: it is open only while somebody may answer.
func (w *sockets) seek(ctx context.Context, heard func(Foreign)) error {
	ctx, cancel := context.WithTimeout(ctx, seekTime)
	defer cancel()
	file, err := listenPackets(w.iface, unix.ETH_P_IP, toClients)
	if err != nil {
		return err
	}
	defer file.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		for range 2 {
			for _, k := range []kind{kindInform, kindDiscover} {
				if err := w.sendFrame(broadcastMAC, unix.ETH_P_IP, question(k, w.iface.HardwareAddr, w.own)); err != nil {
					return err
				}
			}
			if !sleep(ctx, seekStep) {
				break
			}
		}
		return nil
	})
	group.Go(func() error {
		return packets(ctx, w.iface, file, func(frame []byte) {
			if server, offered := serverOf(frame); server != 0 && server != w.own {
				heard(Foreign{Server: server.netip(), MAC: slices.Clone(net.HardwareAddr(frame[6:12])), Offers: offered.netip(), Seen: time.Now()})
			}
		})
	})
	return group.Wait()
}
