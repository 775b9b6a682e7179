package nat

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Egress is what a microVM may open connections to, outside the segment: of its rules the
// first that matches counts, and what none matches is allowed. Empty: everything is.
type Egress []EgressRule

// EgressRule allows or denies.
type EgressRule struct {
	Allow    bool
	To       string         // as it was written
	Prefixes []netip.Prefix // what To means; empty: all addresses
	Protocol string         // tcp, udp, icmp; empty: any
	First    uint16         // of the ports; 0: all
	Last     uint16
}

// private are the prefixes that the word means: of RFC 1918, what is shared with a provider
// (RFC 6598), and link-local.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("169.254.0.0/16"),
}

// ParseEgress reads rules, each `allow|deny DESTINATION [SERVICE]`.
func ParseEgress(texts []string) (Egress, error) {
	var e Egress
	var wrong []error
	for _, text := range texts {
		r, err := parseEgressRule(text)
		if err != nil {
			wrong = append(wrong, fmt.Errorf("egress %q: %w: it must be allow|deny PREFIX|private|all [tcp|udp|icmp|PORT[-PORT]/tcp|/udp]", text, err))
		}
		e = append(e, r)
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, err
	}
	for i, r := range e {
		if len(r.Prefixes) == 0 && r.Protocol == "" && i+1 < len(e) {
			return nil, fmt.Errorf("egress %q: it comes after %q, and so has no effect", e[i+1], r)
		}
	}
	if len(e) > 0 && e.allowsAll() {
		return nil, errors.New("egress: no rule denies anything: what none matches is allowed, end with `deny all` if it is not to be")
	}
	return e, nil
}

func (e Egress) allowsAll() bool {
	for _, r := range e {
		if !r.Allow {
			return false
		}
	}
	return true
}

func parseEgressRule(text string) (r EgressRule, err error) {
	words := strings.Fields(text)
	if len(words) < 2 || len(words) > 3 {
		return r, errors.New("it has not two or three words")
	}
	switch words[0] {
	case "allow":
		r.Allow = true
	case "deny":
	default:
		return r, fmt.Errorf("%q is neither allow nor deny", words[0])
	}
	if r.To, r.Prefixes, err = parseDestination(words[1]); err != nil || len(words) == 2 {
		return r, err
	}
	ports, protocol, found := strings.Cut(words[2], "/")
	if !found {
		if r.Protocol = ports; protocolNumber(ports) == 0 && ports != "icmp" {
			return r, fmt.Errorf("%q is no service", ports)
		}
		return r, nil
	}
	if r.Protocol = protocol; protocolNumber(protocol) == 0 {
		return r, fmt.Errorf("%q has no ports", protocol)
	}
	first, last, found := strings.Cut(ports, "-")
	if r.First, err = parseNumber(first); err != nil {
		return r, err
	}
	if r.Last = r.First; found {
		if r.Last, err = parseNumber(last); err == nil && r.Last < r.First {
			err = fmt.Errorf("%s is no range", ports)
		}
	}
	return r, err
}

func parseDestination(word string) (text string, prefixes []netip.Prefix, err error) {
	switch word {
	case "all":
		return word, nil, nil
	case "private":
		return word, private, nil
	}
	p, err := netip.ParsePrefix(word)
	if a, failed := netip.ParseAddr(word); failed == nil {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil || !p.Addr().Is4() {
		return "", nil, fmt.Errorf("%q is no IPv4 prefix or address, nor private or all", word)
	}
	if p.Masked() != p {
		return "", nil, fmt.Errorf("%s has bits after its prefix, is it %s?", p, p.Masked())
	}
	if p.Bits() == 0 {
		return "all", nil, nil
	}
	return strings.TrimSuffix(p.String(), "/32"), []netip.Prefix{p}, nil
}

// String is what ParseEgress reads.
func (r EgressRule) String() string {
	s := "deny " + r.To
	if r.Allow {
		s = "allow " + r.To
	}
	switch {
	case r.Protocol == "":
		return s
	case r.First == 0:
		return s + " " + r.Protocol
	case r.First == r.Last:
		return s + " " + strconv.Itoa(int(r.First)) + "/" + r.Protocol
	}
	return fmt.Sprintf("%s %d-%d/%s", s, r.First, r.Last, r.Protocol)
}

// Texts are the rules' texts.
func (e Egress) Texts() []string {
	var texts []string
	for _, r := range e {
		texts = append(texts, r.String())
	}
	return texts
}

// MarshalJSON writes the texts.
func (e Egress) MarshalJSON() ([]byte, error) { return json.Marshal(e.Texts()) }

// UnmarshalJSON reads what ParseEgress does.
func (e *Egress) UnmarshalJSON(b []byte) error {
	var texts []string
	err := json.Unmarshal(b, &texts)
	if err == nil {
		*e, err = ParseEgress(texts)
	}
	return err
}

func (e Egress) String() string { return strings.Join(e.Texts(), ", ") }

// Restricted is a guest's card that may not open all connections to the outside, from
// whichever address. Its host holds the guest to the card's MAC address.
type Restricted struct {
	Card   net.HardwareAddr
	Egress Egress
}

func (r Restricted) rule(chain string) string {
	return fmt.Sprintf("%s-m mac --mac-source %s -j %s", egressRule, r.Card, chain)
}

const egressRule = "ipv4 filter FORWARD 0 "

// restrict adds what refuses guests' connections to the outside: a chain for each policy
// that is different, to which a map leads by the source's card, so that a card is an
// element of it; of two policies for one the first counts. Only what guests open is asked about, at each packet: an answer to who
// came in by a published port is none of it, and a connection that a new policy denies ends.
func (h Hub) restrict(b *batch, forward *nftables.Chain) {
	chains := map[string]string{}
	var entries []entry
	seen := map[string]bool{}
	for _, r := range h.Restricted {
		if seen[string(r.Card)] {
			continue
		}
		seen[string(r.Card)] = true
		text := r.Egress.String()
		name := chains[text]
		if name == "" {
			name = fmt.Sprintf("egress-%d", len(chains)+1)
			chains[text] = name
			c := b.plainChain(name)
			for i, rule := range r.Egress {
				rule.add(b, c, i)
			}
		}
		entries = append(entries, entry{
			key: r.Card, chain: name, text: r.rule(name),
		})
	}
	m := b.mapOf(&nftables.Set{Name: "egress", IsMap: true, KeyType: nftables.TypeEtherAddr, DataType: nftables.TypeVerdict}, entries)
	b.rule(forward, "what microVMs may open outside", opening(), iif(h.Inside), oif(h.Outside), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFTYPE, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
		&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
	})
}

// add adds a policy's rule: one for each prefix. Its number makes its text the only one.
func (r EgressRule) add(b *batch, c *nftables.Chain, number int) {
	do := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	if !r.Allow {
		const prohibited = 13 // RFC 1812
		do = []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: prohibited}}
	}
	var service []expr.Any
	switch {
	case r.Protocol == "":
	case r.Protocol == "icmp":
		service = l4proto(unix.IPPROTO_ICMP)
	case r.First == 0:
		service = l4proto(protocolNumber(r.Protocol))
	case r.First == r.Last:
		service = port(protocolNumber(r.Protocol), r.First)
	default:
		service = append(l4proto(protocolNumber(r.Protocol)),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: binaryutil.BigEndian.PutUint16(r.First), ToData: binaryutil.BigEndian.PutUint16(r.Last)},
		)
	}
	text := fmt.Sprintf("%d: %s", number+1, r)
	if len(r.Prefixes) == 0 {
		b.rule(c, text, service, do)
	}
	for i, p := range r.Prefixes {
		if i > 0 {
			text = fmt.Sprintf("%d: %s (%s)", number+1, r, p)
		}
		b.rule(c, text, destination(p), service, do)
	}
}

// opening matches what goes in the direction in which its connection was opened.
func opening() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}}, // IP_CT_DIR_ORIGINAL
	}
}
