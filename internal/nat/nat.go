// Package nat sets what a machine forwards, rewrites and refuses. It is the only
// package that speaks nftables. Each role has one table of ours, replaced in one
// transaction; rules of others are never touched. It watches nothing: Check says
// what is missing when it is asked.
package nat

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Table is the name of the tables that a role has in its own network namespace.
const Table = "ingot"

// Hub is what a network hub forwards and refuses.
type Hub struct {
	Inside  string       // the segment's interface
	Outside string       // the uplink
	Trusted netip.Prefix // who may open connections into the segment from outside
	// Platform are the addresses of the environment's machines. Only they and
	// Trusted reach Management.
	Platform   []netip.Addr
	Management []uint16 // TCP ports
}

// Rule is one rule that ought to be in force.
type Rule struct {
	Text    string // in the form of `firewall-cmd --direct`: ipv4 nat POSTROUTING 0 -o bond0 -j MASQUERADE
	Present bool
}

// forwardText and masqueradeText are the two rules that the environment's
// description shows.
func (h Hub) forwardText() string {
	return fmt.Sprintf("ipv4 filter FORWARD 0 -i %s -o %s -j ACCEPT", h.Inside, h.Outside)
}

func (h Hub) masqueradeText() string {
	return fmt.Sprintf("ipv4 nat POSTROUTING 0 -o %s -j MASQUERADE", h.Outside)
}

// SetHub replaces the hub's table.
func SetHub(h Hub) error {
	b, err := begin(nftables.TableFamilyIPv4, Table)
	if err != nil {
		return err
	}
	platform := b.addresses("platform", h.Platform)
	drop := nftables.ChainPolicyDrop
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, &drop)
	b.rule(forward, h.forwardText(), iif(h.Inside), oif(h.Outside), verdict(expr.VerdictAccept))
	b.rule(forward, "", established(), verdict(expr.VerdictAccept))
	b.rule(forward, "", iif(h.Outside), oif(h.Inside), source(h.Trusted), verdict(expr.VerdictAccept))
	postrouting := b.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nil)
	b.rule(postrouting, h.masqueradeText(), oif(h.Outside), []expr.Any{&expr.Masq{}})
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nil)
	for _, port := range h.Management {
		b.rule(input, "", iif(h.Inside), sourceNotIn(platform), port4(unix.IPPROTO_TCP, port), verdict(expr.VerdictDrop))
	}
	return b.commit()
}

// CheckHub says of the rules that the hub ought to have which are in force.
func CheckHub(h Hub) ([]Rule, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: Table}
	var rules []Rule
	for _, want := range []struct{ chain, text string }{
		{"forward", h.forwardText()},
		{"postrouting", h.masqueradeText()},
	} {
		have, err := c.GetRules(table, &nftables.Chain{Name: want.chain, Table: table})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("read rules of %s: %w", want.chain, err)
		}
		rule := Rule{Text: want.text}
		for _, r := range have {
			if text, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && text == want.text {
				rule.Present = true
			}
		}
		rules = append(rules, rule)
	}
	return rules, nil
}

// Host is what a microVM host refuses its guests.
type Host struct {
	Segment string           // the segment's interface
	MAC     net.HardwareAddr // its address: other frames from Port are macvtap guests'
	Bridge  string           // the guests' bridge; empty: none
	Port    string           // Segment's other end, a port of Bridge
	// Platform are the addresses of the environment's machines, which guests
	// reach only for names, addresses and images, and these only at Hub.
	Platform   []netip.Addr
	Hub        netip.Addr
	Trusted    netip.Prefix // who else reaches Management
	Management []uint16     // TCP ports
}

// SetHost replaces the host's tables.
func SetHost(h Host) error {
	if err := setHostInput(h); err != nil {
		return err
	}
	if h.Bridge == "" {
		return nil
	}
	return setHostBridge(h)
}

func setHostInput(h Host) error {
	b, err := begin(nftables.TableFamilyINet, Table)
	if err != nil {
		return err
	}
	platform := b.addresses("platform", h.Platform)
	// What comes from a tap that is no bridge's port comes from a guest's metadata
	// interface. Without this, the guest could reach any address of this machine
	// through it.
	metadata := b.chain("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nil)
	service := netip.MustParsePrefix("169.254.169.254/32")
	b.rule(metadata, "", iif("fltap*"), ipv4(), destination(service), port4(unix.IPPROTO_TCP, 80), verdict(expr.VerdictAccept))
	b.rule(metadata, "", iif("fltap*"), verdict(expr.VerdictDrop))
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nil)
	if h.Bridge != "" {
		// The bridge carries guests' frames; none is for this machine by way of it.
		b.rule(input, "", iif(h.Bridge), verdict(expr.VerdictDrop))
	}
	for _, port := range h.Management {
		b.rule(input, "", iif(h.Segment), ipv4(), source(h.Trusted), port4(unix.IPPROTO_TCP, port), verdict(expr.VerdictAccept))
		b.rule(input, "", iif(h.Segment), ipv4(), sourceNotIn(platform), port4(unix.IPPROTO_TCP, port), verdict(expr.VerdictDrop))
	}
	return b.commit()
}

func setHostBridge(h Host) error {
	b, err := begin(nftables.TableFamilyBridge, Table)
	if err != nil {
		return err
	}
	platform := b.addresses("platform", h.Platform)
	guest := b.plainChain("guest")
	drop := verdict(expr.VerdictDrop)
	b.rule(guest, "", etherType(unix.ETH_P_8021Q), drop)
	b.rule(guest, "", etherType(unix.ETH_P_8021AD), drop)
	b.rule(guest, "", etherType(unix.ETH_P_IPV6), l4proto(unix.IPPROTO_ICMPV6), payload(expr.PayloadBaseTransportHeader, 0, []byte{134}), drop)
	b.rule(guest, "", etherType(unix.ETH_P_IPV6), sport6(547), drop)
	b.rule(guest, "", bridgeIPv4(), l4proto(unix.IPPROTO_UDP), sport(67), drop)
	b.rule(guest, "", bridgeIPv4(), destination(netip.MustParsePrefix("169.254.0.0/16")), drop)
	accept := verdict(expr.VerdictAccept)
	b.rule(guest, "", bridgeIPv4(), destinationNotIn(platform), accept)
	if h.Hub.IsValid() {
		hub := destination(netip.PrefixFrom(h.Hub, 32))
		b.rule(guest, "", bridgeIPv4(), hub, port4(unix.IPPROTO_UDP, 67), accept)
		b.rule(guest, "", bridgeIPv4(), hub, port4(unix.IPPROTO_UDP, 53), accept)
		b.rule(guest, "", bridgeIPv4(), hub, port4(unix.IPPROTO_TCP, 53), accept)
		b.rule(guest, "", bridgeIPv4(), hub, port4(unix.IPPROTO_TCP, 5000), accept)
	}
	b.rule(guest, "", bridgeIPv4(), l4proto(unix.IPPROTO_ICMP), accept)
	// An answer to what the platform asked: `ssh`, a published port, a probe.
	b.rule(guest, "", bridgeIPv4(), l4proto(unix.IPPROTO_TCP), acknowledges(), accept)
	b.rule(guest, "", bridgeIPv4(), drop)
	jump := []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: guest.Name}}
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nil)
	b.rule(forward, "", iif("fltap*"), jump)
	b.rule(forward, "", iif(h.Port), etherSourceNot(h.MAC), jump)
	return b.commit()
}

// Lab is what the machine of a lab forwards for it.
type Lab struct {
	Table  string
	Uplink string       // this machine's end of the veth to the hub
	Subnet netip.Prefix // of that veth
}

// SetLab replaces the lab's table in the machine's own network namespace: the
// lab's packets leave under the machine's address, nothing that the lab did not
// ask for gets in, and the lab's guests reach no service of the machine's own.
func SetLab(l Lab) error {
	b, err := begin(nftables.TableFamilyIPv4, l.Table)
	if err != nil {
		return err
	}
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nil)
	b.rule(forward, "", oif(l.Uplink), established(), verdict(expr.VerdictAccept))
	b.rule(forward, "", oif(l.Uplink), verdict(expr.VerdictDrop))
	// Nor do guests get at what this machine serves, but for names.
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nil)
	b.rule(input, "", iif(l.Uplink), established(), verdict(expr.VerdictAccept))
	b.rule(input, "", iif(l.Uplink), l4proto(unix.IPPROTO_ICMP), verdict(expr.VerdictAccept))
	b.rule(input, "", iif(l.Uplink), port4(unix.IPPROTO_UDP, 53), verdict(expr.VerdictAccept))
	b.rule(input, "", iif(l.Uplink), port4(unix.IPPROTO_TCP, 53), verdict(expr.VerdictAccept))
	b.rule(input, "", iif(l.Uplink), verdict(expr.VerdictDrop))
	postrouting := b.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nil)
	b.rule(postrouting, "", source(l.Subnet), oifNot(l.Uplink), []expr.Any{&expr.Masq{}})
	return b.commit()
}

// Present says whether there is a table of that name.
func Present(table string) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("read nftables: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return false, fmt.Errorf("list nftables: %w", err)
	}
	for _, t := range tables {
		if t.Name == table {
			return true, nil
		}
	}
	return false, nil
}

// Remove deletes every table of that name. None is no error.
func Remove(table string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("list nftables: %w", err)
	}
	for _, t := range tables {
		if t.Name == table {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove nftables table %s: %w", table, err)
	}
	return nil
}

// SetForwarding lets the machine forward what comes in on an interface, or not,
// and says what it did before.
func SetForwarding(iface string, on bool) (before bool, err error) {
	value := "0"
	if on {
		value = "1"
	}
	was, err := link.Sysctl(iface, "forwarding", value)
	return was == "1", err
}

// Forwarding says whether the machine forwards what comes in on an interface.
func Forwarding(iface string) (bool, error) {
	value, err := link.GetSysctl(iface, "forwarding")
	return value == "1", err
}
