package nat

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// passageMark begins the comment of our rules in others' chains.
const passageMark = "ingot: let pass "

// SetPassage lets packets of an interface through the forward chains of others
// that drop what they don't know (Docker's, ufw's): an accept in a table of our
// own can't undo another table's drop. Two rules go to the head of each such
// chain, in a form that iptables can show; what may come in is decided in our own
// table. It returns the chains that it added rules to.
func SetPassage(iface string) (added []string, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := droppingChains(c)
	if err != nil {
		return nil, err
	}
	return letPass(c, chains, iface)
}

// letPass puts the two rules into each chain that has not got both and no more, in
// place of what it has of them.
func letPass(c *nftables.Conn, chains []*nftables.Chain, iface string) (added []string, err error) {
	for _, chain := range chains {
		have, err := passageRules(chain, iface)
		if err != nil {
			return nil, err
		}
		if len(have) == 2 && direction(have[0]) != direction(have[1]) {
			continue
		}
		if err := takeAway(c, chain, have); err != nil {
			return nil, err
		}
		for _, match := range [][]expr.Any{oif(iface), iif(iface)} {
			c.InsertRule(&nftables.Rule{
				Table: chain.Table, Chain: chain,
				Exprs:    append(match, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}),
				UserData: userdata.AppendString(nil, userdata.TypeComment, passageMark+iface),
			})
		}
		added = append(added, chain.Table.Name+" "+chain.Name)
	}
	if err := c.Flush(); err != nil {
		return nil, fmt.Errorf("let %s pass: %w", iface, err)
	}
	return added, nil
}

// direction is what a rule of ours looks at: the interface in, or out.
func direction(r kernelRule) expr.MetaKey {
	for _, e := range r.expressions() {
		if meta, ok := e.(*expr.Meta); ok {
			return meta.Key
		}
	}
	return 0
}

// RemovePassage takes away what SetPassage has added.
func RemovePassage(iface string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward {
			continue
		}
		rules, err := passageRules(chain, iface)
		if err == nil {
			err = takeAway(c, chain, rules)
		}
		if err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove rules of %s: %w", iface, err)
	}
	return nil
}

// droppingChains are others' base chains that drop forwarded IPv4 packets by policy.
func droppingChains(c *nftables.Conn) ([]*nftables.Chain, error) {
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var found []*nftables.Chain
	for _, chain := range chains {
		if othersForward(chain) && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop {
			found = append(found, chain)
		}
	}
	return found, nil
}

func passageRules(chain *nftables.Chain, iface string) ([]kernelRule, error) {
	rules, err := kernelRules(chain)
	if err != nil {
		return nil, fmt.Errorf("read rules of %s %s: %w", chain.Table.Name, chain.Name, err)
	}
	return slices.DeleteFunc(rules, func(r kernelRule) bool { return r.comment != passageMark+iface }), nil
}

func takeAway(c *nftables.Conn, chain *nftables.Chain, rules []kernelRule) error {
	for _, r := range rules {
		if err := c.DelRule(&nftables.Rule{Table: chain.Table, Chain: chain, Handle: r.handle}); err != nil {
			return fmt.Errorf("remove rule: %w", err)
		}
	}
	return nil
}
