package nat

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Obstacle is a forward chain of others' that does not let an interface's packets
// through.
type Obstacle struct {
	Owner  string // Docker, ufw, firewalld, …; empty where nothing tells
	Family string // as nft has it: ip, inet
	Table  string
	Chain  string // the base chain
	By     string // what drops: "policy drop", "reject in FORWARD_end"
}

// ByPolicy is what By is for a chain that drops what it does not know.
const ByPolicy = "policy drop"

func (o Obstacle) String() string {
	s := fmt.Sprintf("%s %s %s (%s)", o.Family, o.Table, o.Chain, o.By)
	if o.Owner != "" {
		s = o.Owner + "'s " + s
	}
	return s
}

// Obstacles finds the chains that drop or reject what goes from one interface to
// another, or the answers to it. It follows a new connection's first packet, and an
// answer, through each chain. A rule that asks for more than interface and
// connection state (an address, a port, a mark) is taken not to match: who drops
// some ports only is no obstacle. What the old iptables interface holds is not seen.
func Obstacles(from, to string) ([]Obstacle, error) {
	r := &ruleset{conn: &nftables.Conn{}, rules: map[string][]kernelRule{}}
	chains, err := r.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	r.chains = chains
	var found []Obstacle
	for _, base := range chains {
		if !othersForward(base) {
			continue
		}
		by := r.follow(base, packet{from, to, expr.CtStateBitNEW})
		if by == "" {
			by = r.follow(base, packet{to, from, expr.CtStateBitESTABLISHED})
		}
		if r.err != nil {
			return nil, fmt.Errorf("read rules of %s %s: %w", base.Table.Name, base.Name, r.err)
		}
		if by != "" {
			found = append(found, Obstacle{r.owner(base.Table), familyName(base.Table.Family), base.Table.Name, base.Name, by})
		}
	}
	return found, nil
}

// LetPass lets an interface's packets through the chains of obstacles, as
// SetPassage does through those that drop by policy. RemovePassage undoes both.
func LetPass(iface string, obstacles []Obstacle) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	all, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	var chains []*nftables.Chain
	for _, chain := range all {
		for _, o := range obstacles {
			if o.Family == familyName(chain.Table.Family) && o.Table == chain.Table.Name && o.Chain == chain.Name {
				chains = append(chains, chain)
			}
		}
	}
	_, err = letPass(c, chains, iface)
	return err
}

// othersForward says whether chain is a base chain of others' that forwarded IPv4
// packets pass.
func othersForward(chain *nftables.Chain) bool {
	family := chain.Table.Family
	return !strings.HasPrefix(chain.Table.Name, Table) &&
		(family == nftables.TableFamilyIPv4 || family == nftables.TableFamilyINet) &&
		chain.Hooknum != nil && *chain.Hooknum == *nftables.ChainHookForward
}

func familyName(f nftables.TableFamily) string {
	if f == nftables.TableFamilyIPv4 {
		return "ip"
	}
	return "inet"
}

// packet is what the rules are asked about.
type packet struct {
	iif, oif string
	state    uint32
}

// ruleset is the kernel's, read as far as it is followed.
type ruleset struct {
	conn   *nftables.Conn
	chains []*nftables.Chain
	rules  map[string][]kernelRule // by family, table and chain
	err    error
}

// owner guesses from names who made a table.
func (r *ruleset) owner(t *nftables.Table) string {
	if t.Name == "firewalld" {
		return "firewalld"
	}
	for _, chain := range r.chains {
		if chain.Table.Name != t.Name || chain.Table.Family != t.Family {
			continue
		}
		for _, known := range [][2]string{{"ufw-", "ufw"}, {"DOCKER", "Docker"}, {"LIBVIRT_", "libvirt"}, {"KUBE-", "Kubernetes"}} {
			if strings.HasPrefix(chain.Name, known[0]) {
				return known[1]
			}
		}
	}
	return ""
}

// follow says what drops a packet in a base chain; empty: it gets through.
func (r *ruleset) follow(base *nftables.Chain, p packet) string {
	verdict, by := r.walk(base.Table, base.Name, p, 0)
	if verdict == expr.VerdictContinue && base.Policy != nil && *base.Policy == nftables.ChainPolicyDrop {
		return ByPolicy
	}
	if verdict == expr.VerdictDrop {
		return by
	}
	return ""
}

// deepest is more than the kernel's limit of jumps.
const deepest = 20

// walk follows a packet through a chain until it is accepted or dropped
// (VerdictContinue: neither).
func (r *ruleset) walk(t *nftables.Table, chain string, p packet, depth int) (expr.VerdictKind, string) {
	if depth > deepest {
		return expr.VerdictContinue, ""
	}
	for _, rule := range r.of(t, chain) {
		verdict, target, matches := r.ask(t, rule, p)
		if !matches {
			continue
		}
		switch verdict {
		case expr.VerdictAccept, expr.VerdictDrop:
			return verdict, describe(rule, chain)
		case expr.VerdictReturn:
			return expr.VerdictContinue, ""
		case expr.VerdictJump, expr.VerdictGoto:
			then, by := r.walk(t, target, p, depth+1)
			if then != expr.VerdictContinue || verdict == expr.VerdictGoto {
				return then, by
			}
		}
	}
	return expr.VerdictContinue, ""
}

func (r *ruleset) of(t *nftables.Table, chain string) []kernelRule {
	key := fmt.Sprintf("%d %s %s", t.Family, t.Name, chain)
	rules, known := r.rules[key]
	if !known {
		var err error
		if rules, err = kernelRules(&nftables.Chain{Name: chain, Table: t}); err != nil && r.err == nil {
			r.err = err
		}
		r.rules[key] = rules
	}
	return rules
}

// describe names a rule that drops: by its comment, or by what it does.
func describe(rule kernelRule, chain string) string {
	what := "drop"
	for _, e := range rule.expressions() {
		switch e := e.(type) {
		case *expr.Reject:
			what = "reject"
		case *expr.Target:
			what = strings.ToLower(e.Name)
		}
	}
	what += " in " + chain
	if rule.comment != "" {
		what += ": " + rule.comment
	}
	return what
}

// ask says whether a rule matches a packet, and what it does with it then.
func (r *ruleset) ask(t *nftables.Table, rule kernelRule, p packet) (_ expr.VerdictKind, target string, matches bool) {
	registers := map[uint32][]byte{} // what is known of their content
	for _, e := range rule.expressions() {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Meta:
			registers[e.Register] = p.meta(e.Key)
		case *expr.Ct:
			registers[e.Register] = nil
			if e.Key == expr.CtKeySTATE {
				registers[e.Register] = binaryutil.NativeEndian.PutUint32(p.state)
			}
		case *expr.Bitwise:
			registers[e.DestRegister] = bitwise(registers[e.SourceRegister], e.Mask, e.Xor)
		case *expr.Cmp:
			if !compare(registers[e.Register], e) {
				return 0, "", false
			}
		case *expr.Lookup:
			if e.IsDestRegSet || !r.contains(t, e, registers[e.SourceRegister]) {
				return 0, "", false
			}
		case *expr.Verdict:
			return e.Kind, e.Chain, true
		case *expr.Reject:
			return expr.VerdictDrop, "", true
		case *expr.Match: // of iptables; what it asks for is not known here
			if e.Name != "comment" {
				return 0, "", false
			}
		case *expr.Target:
			return expr.VerdictDrop, "", e.Name == "REJECT" || e.Name == "DROP"
		default:
			return 0, "", false
		}
	}
	return expr.VerdictContinue, "", true
}

// meta is what is known of the packet; nil: nothing.
func (p packet) meta(key expr.MetaKey) []byte {
	name := make([]byte, unix.IFNAMSIZ)
	switch key {
	case expr.MetaKeyIIFNAME:
		copy(name, p.iif)
	case expr.MetaKeyOIFNAME:
		copy(name, p.oif)
	case expr.MetaKeyNFPROTO:
		return []byte{unix.NFPROTO_IPV4}
	case expr.MetaKeyPROTOCOL:
		return binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP)
	default:
		return nil
	}
	return name
}

func bitwise(b, mask, xor []byte) []byte {
	if len(b) != len(mask) || len(b) != len(xor) {
		return nil
	}
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i]&mask[i] ^ xor[i]
	}
	return out
}

// compare is false for what is not known. A name that is shorter than the
// register is a beginning: eth*.
func compare(have []byte, want *expr.Cmp) bool {
	if have == nil || len(want.Data) > len(have) {
		return false
	}
	same := bytes.Equal(have[:len(want.Data)], want.Data)
	switch want.Op {
	case expr.CmpOpEq:
		return same
	case expr.CmpOpNeq:
		return !same
	}
	return false
}

// contains looks into a set of single values.
func (r *ruleset) contains(t *nftables.Table, l *expr.Lookup, value []byte) bool {
	if value == nil {
		return false
	}
	set, err := r.conn.GetSetByName(t, l.SetName)
	if err != nil || set.Interval {
		return false
	}
	elements, err := r.conn.GetSetElements(set)
	if err != nil {
		return false
	}
	for _, e := range elements {
		if bytes.Equal(bytes.TrimRight(e.Key, "\x00"), bytes.TrimRight(value, "\x00")) {
			return !l.Invert
		}
	}
	return l.Invert
}
