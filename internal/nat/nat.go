// Package nat sets what a machine forwards, rewrites and refuses. It is the only
// package that speaks nftables. Each role has tables of ours, each replaced in one
// transaction; rules of others are never touched. Guard keeps a host's in force; by
// them the kernel learns from DHCP which address a guest has. The other roles' are
// watched by nobody: CheckHub and CheckLab say what is missing when they are asked.
package nat

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"ingot/internal/link"
)

// Table is the name of the tables that a role has in its own network namespace.
const Table = "ingot"

// Hub is what a network hub forwards and refuses.
type Hub struct {
	Inside  string       // the segment's interface
	Outside string       // the uplink
	Trusted netip.Prefix // who may open connections into the segment from outside; zero: nobody
	// Platform are the addresses of the environment's machines. Only they and
	// Trusted reach Management.
	Platform   []netip.Addr
	Management []uint16 // TCP ports
	VPN        VPN      // zero: there is none
	// Tailnet is one more, whose peers come under the hub's address: its subnet is
	// everybody's, and machines know nothing of it. Zero: there is none.
	Tailnet    VPN
	Segment    netip.Prefix
	Published  []Published // what leads from outside to microVMs
	Restricted []Restricted
}

// VPN is by what peers, who are operators' devices, come to the hub. They reach the
// segment and the hub, but neither the world nor each other.
type VPN struct {
	Interface string
	Subnet    netip.Prefix
	Port      uint16 // UDP, which no guest needs
}

// forwardText and masqueradeText are the two rules that the environment's
// description shows.
func (h Hub) forwardText() string {
	return fmt.Sprintf("ipv4 filter FORWARD 0 -i %s -o %s -j ACCEPT", h.Inside, h.Outside)
}

func (h Hub) masqueradeText() string {
	return fmt.Sprintf("ipv4 nat POSTROUTING 0 -o %s -j MASQUERADE", h.Outside)
}

// Described are these two. firewalld is told them, where it runs.
func (h Hub) Described() []string { return []string{h.forwardText(), h.masqueradeText()} }

// SetHub replaces the hub's table.
func SetHub(h Hub) error {
	b, err := h.table()
	if err != nil {
		return err
	}
	return b.commit()
}

// CheckHub says which are in force of the rules that the environment's description shows
// and of what is about one microVM, and names all others that the hub ought to have and has not.
func CheckHub(h Hub) ([]Rule, error) {
	b, err := h.table()
	if err != nil {
		return nil, err
	}
	rules, err := b.check()
	if err != nil {
		return nil, err
	}
	described := map[string]string{"forward: " + h.forwardText(): h.forwardText(), "postrouting: " + h.masqueradeText(): h.masqueradeText()}
	var told []Rule
	for _, r := range rules {
		if text := described[r.Text]; text != "" {
			told = append(told, Rule{text, r.Present})
		} else if !r.Present || aboutGuest(r.Text) {
			told = append(told, r)
		}
	}
	return told, nil
}

func (h Hub) table() (*batch, error) {
	b, err := begin(nftables.TableFamilyIPv4, Table)
	if err != nil {
		return nil, err
	}
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	platform := b.addresses("platform", h.Platform)
	h.untrack(b, platform)
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	// First what most packets are: the order is for speed.
	if len(h.Restricted) > 0 {
		h.restrict(b, forward)
	}
	b.rule(forward, "what goes on", established(), accept)
	b.rule(forward, "no packets of no connection", iif(h.Inside), oif(h.Outside), invalid(), drop)
	b.rule(forward, h.forwardText(), iif(h.Inside), oif(h.Outside), accept)
	if h.Trusted.IsValid() {
		b.rule(forward, "trusted into the segment", iif(h.Outside), oif(h.Inside), source(h.Trusted), accept)
	}
	if h.VPN.Interface != "" {
		b.rule(forward, "peers into the segment", iif(h.VPN.Interface), oif(h.Inside), source(h.VPN.Subnet), accept)
	}
	if h.Tailnet.Interface != "" {
		b.rule(forward, "tailnet into the segment", iif(h.Tailnet.Interface), oif(h.Inside), source(h.Tailnet.Subnet), accept)
	}
	b.rule(forward, "published ports", oif(h.Inside), passedOn(), accept)
	postrouting := b.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	b.rule(postrouting, h.masqueradeText(), oif(h.Outside), []expr.Any{&expr.Masq{}})
	if h.Tailnet.Interface != "" {
		b.rule(postrouting, "tailnet under this machine's address", oif(h.Inside), source(h.Tailnet.Subnet), []expr.Any{&expr.Masq{}})
	}
	// Who is on the segment too would be answered directly, by somebody it has not asked.
	b.rule(postrouting, "the segment's own ways to published ports", oif(h.Inside), source(h.Segment), passedOn(), asAsked())
	h.publish(b, platform)
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	// First what comes most often.
	b.rule(input, "names for the segment", port(unix.IPPROTO_UDP, 53), iif(h.Inside), accept)
	b.rule(input, "this machine", iif("lo"), accept)
	b.rule(input, "machines", iif(h.Inside), sourceIn(platform), accept)
	if h.Trusted.IsValid() {
		b.rule(input, "trusted", iif(h.Outside), source(h.Trusted), accept)
	}
	if h.VPN.Interface != "" {
		b.rule(input, "peers", iif(h.VPN.Interface), source(h.VPN.Subnet), accept)
		b.rule(input, "no guest to the VPN's port", iif(h.Inside), port(unix.IPPROTO_UDP, h.VPN.Port), drop)
	}
	if h.Tailnet.Interface != "" {
		b.rule(input, "tailnet", iif(h.Tailnet.Interface), source(h.Tailnet.Subnet), accept)
		b.rule(input, "no guest to the tailnet's port", iif(h.Inside), port(unix.IPPROTO_UDP, h.Tailnet.Port), drop)
	}
	for _, number := range h.Management {
		b.rule(input, fmt.Sprintf("nobody else to %d", number), port(unix.IPPROTO_TCP, number), drop)
	}
	// What the hub serves on the segment is not served to its uplink's neighbours,
	// who may have a route to the segment's addresses.
	for _, s := range segmentServices {
		b.rule(input, fmt.Sprintf("%s to %d from the segment only", s.name, s.port), iifNot(h.Inside), destinationIn(platform), port(s.protocol, s.port), drop)
	}
	return b, nil
}

// untrack has the kernel keep no connections of what is asked often and answered at
// once, which takes time and fills its table: names, of a machine's address on the
// segment, and DHCP. No rule of ours asks about those.
func (h Hub) untrack(b *batch, platform *nftables.Set) {
	notrack := []expr.Any{&expr.Notrack{}, &expr.Verdict{Kind: expr.VerdictAccept}}
	questions := b.chain("questions", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	b.rule(questions, "for names", port(unix.IPPROTO_UDP, 53), iif(h.Inside), destinationIn(platform), notrack)
	b.rule(questions, "for leases", port(unix.IPPROTO_UDP, 67), iif(h.Inside), destinationIn(platform), notrack)
	b.rule(questions, "for leases, of anybody", port(unix.IPPROTO_UDP, 67), iif(h.Inside), destination(everybody), notrack)
	answers := b.chain("answers", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	b.rule(answers, "about names", udpFrom(53), oif(h.Inside), sourceIn(platform), notrack)
	b.rule(answers, "about leases", udpFrom(67), oif(h.Inside), sourceIn(platform), notrack)
}

var everybody = netip.MustParsePrefix("255.255.255.255/32") // on the segment

// segmentServices are what the hub serves to guests.
var segmentServices = []struct {
	name     string
	protocol byte
	port     uint16
}{
	{"udp", unix.IPPROTO_UDP, 67},
	{"udp", unix.IPPROTO_UDP, 53},
	{"tcp", unix.IPPROTO_TCP, 53},
	{"tcp", unix.IPPROTO_TCP, 5000},
}

// Lab is what the machine of a lab forwards for it.
type Lab struct {
	Table  string
	Uplink string       // this machine's end of the veth to the hub
	Subnet netip.Prefix // of that veth
	// Public is a UDP port that is the hub's own: what comes to it on any address of
	// this machine's goes there. Zero: none.
	Public uint16
	Hub    netip.Addr // the hub's end of the veth
}

// SetLab replaces the lab's table in the machine's own network namespace: the
// lab's packets leave under the machine's address, nothing that the lab did not
// ask for gets in, and the lab's guests reach no service of the machine's own.
func SetLab(l Lab) error {
	b, err := l.table()
	if err != nil {
		return err
	}
	return b.commit()
}

// CheckLab names what the lab's table ought to have and has not.
func CheckLab(l Lab) ([]string, error) {
	b, err := l.table()
	if err != nil {
		return nil, err
	}
	rules, err := b.check()
	return missing(rules), err
}

func (l Lab) table() (*batch, error) {
	b, err := begin(nftables.TableFamilyIPv4, l.Table)
	if err != nil {
		return nil, err
	}
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	forward := b.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	b.rule(forward, "answers", oif(l.Uplink), established(), accept)
	if l.Public != 0 {
		to, text := netip.PrefixFrom(l.Hub, 32), fmt.Sprintf("udp %d is the hub's", l.Public)
		b.rule(forward, text, oif(l.Uplink), destination(to), port(unix.IPPROTO_UDP, l.Public), accept)
		// Not the lab's own: guests have no business there.
		public := b.chain("public", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
		b.rule(public, text, iifNot(l.Uplink), toThisMachine(), port(unix.IPPROTO_UDP, l.Public), passOn(l.Hub, l.Public))
	}
	b.rule(forward, "nobody else in", oif(l.Uplink), drop)
	// Nor do guests get at what this machine serves, but for names.
	input := b.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	b.rule(input, "answers", iif(l.Uplink), established(), accept)
	b.rule(input, "ping", iif(l.Uplink), l4proto(unix.IPPROTO_ICMP), accept)
	b.rule(input, "names", iif(l.Uplink), port(unix.IPPROTO_UDP, 53), accept)
	b.rule(input, "long names", iif(l.Uplink), port(unix.IPPROTO_TCP, 53), accept)
	b.rule(input, "nothing else here", iif(l.Uplink), drop)
	postrouting := b.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	b.rule(postrouting, "under this machine's address", source(l.Subnet), oifNot(l.Uplink), []expr.Any{&expr.Masq{}})
	return b, nil
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
func Remove(table string) error { return remove(nftables.TableFamilyUnspecified, table) }

// remove deletes what there is of that name in one family, or in all.
func remove(family nftables.TableFamily, table string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(family)
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
