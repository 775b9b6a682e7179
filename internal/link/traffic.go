package link

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Traffic is what an interface has carried so far, as this machine sees it: what a
// guest behind a tap sends is received.
type Traffic struct {
	ReceivedPackets, SentPackets uint64
	ReceivedBytes, SentBytes     uint64
}

// statsHeader is the length of struct if_stats_msg (linux/if_link.h): a family and
// padding, an interface's index, and a mask of what is asked for.
const statsHeader = 12

// ReadTraffic returns the traffic of all interfaces of the current network namespace,
// by their index. It asks the kernel once, for the counters alone: a list of a
// thousand interfaces with all that is known of them costs many times as much. An
// interface that comes or goes meanwhile may be missing.
func ReadTraffic() (map[int]Traffic, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETSTATS, unix.NLM_F_DUMP)
	ask := make([]byte, statsHeader)
	binary.NativeEndian.PutUint32(ask[8:], 1<<(unix.IFLA_STATS_LINK_64-1))
	request.AddRawData(ask)
	answers, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWSTATS)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("read interfaces' counters: %w", err)
	}
	all := make(map[int]Traffic, len(answers))
	for _, a := range answers {
		if index, t, ok := parseTraffic(a); ok {
			all[index] = t
		}
	}
	return all, nil
}

// parseTraffic reads one message's header, attribute and struct rtnl_link_stats64.
func parseTraffic(b []byte) (index int, t Traffic, ok bool) {
	const attribute = 4
	if len(b) < statsHeader+attribute+4*8 || binary.NativeEndian.Uint16(b[statsHeader+2:]) != unix.IFLA_STATS_LINK_64 {
		return 0, Traffic{}, false
	}
	counter := func(n int) uint64 { return binary.NativeEndian.Uint64(b[statsHeader+attribute+8*n:]) }
	return int(binary.NativeEndian.Uint32(b[4:])), Traffic{counter(0), counter(1), counter(2), counter(3)}, true
}
