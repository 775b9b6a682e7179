package nat

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// Rule is something that ought to be in force.
type Rule struct {
	Text    string // in the form of `firewall-cmd --direct`: ipv4 nat POSTROUTING 0 -o bond0 -j MASQUERADE
	Present bool
}

// missing leaves those that are not in force.
func missing(rules []Rule) []string {
	var texts []string
	for _, r := range rules {
		if !r.Present {
			texts = append(texts, r.Text)
		}
	}
	return texts
}

// check says of all that the batch would make whether it is in force: each rule by
// its comment, each chain's policy and that it holds nothing else, each set.
func (b *batch) check() ([]Rule, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	rules, err := b.compare(c)
	if err != nil {
		return nil, fmt.Errorf("read nftables table %s: %w", b.table.Name, err)
	}
	return rules, nil
}

func (b *batch) compare(c *nftables.Conn) ([]Rule, error) {
	tables, err := c.ListTablesOfFamily(b.table.Family)
	if err != nil {
		return nil, err
	}
	// A table that sleeps has a flag, ours have none.
	awake := slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == b.table.Name && t.Flags == 0 })
	chains, err := c.ListChainsOfTableFamily(b.table.Family)
	if err != nil {
		return nil, err
	}
	var rules []Rule
	for _, want := range b.chains {
		comments, err := comments(want)
		if err != nil {
			return nil, err
		}
		texts, all := b.rules[want.Name], true
		for _, text := range texts {
			there := awake && slices.Contains(comments, text)
			all = all && there
			rules = append(rules, Rule{want.Name + ": " + text, there})
		}
		whole := awake && slices.ContainsFunc(chains, func(have *nftables.Chain) bool { return sameChain(have, want) })
		// What is missing is named above; this is about what there is beside it.
		rules = append(rules, Rule{"chain " + want.Name + " as it was made, with no other rules", whole && (!all || slices.Equal(comments, texts))})
	}
	for name, want := range b.sets {
		have, there, err := elements(c, &nftables.Set{Table: b.table, Name: name})
		if err != nil {
			return nil, err
		}
		verdicts := slices.ContainsFunc(want, func(e entry) bool { return e.chain != "" })
		told, asked, all := wholes(have, verdicts), map[string]bool{}, true
		for _, e := range want {
			is := awake && told[string(e.whole())]
			all = all && is
			asked[string(e.whole())] = true
			if e.text != "" {
				rules = append(rules, Rule{e.text, is})
			}
		}
		rules = append(rules, Rule{"set " + name, there && (want == nil || all && len(told) == len(asked))})
	}
	return rules, nil
}

func sameChain(have, want *nftables.Chain) bool {
	if have.Table.Name != want.Table.Name || have.Name != want.Name || (have.Hooknum == nil) != (want.Hooknum == nil) {
		return false
	}
	return want.Hooknum == nil || *have.Hooknum == *want.Hooknum && have.Policy != nil && *have.Policy == *want.Policy
}

// comments are those of a chain's rules, none if there is no such chain; a rule without
// one has an empty one.
func comments(chain *nftables.Chain) ([]string, error) {
	rules, err := kernelRules(chain)
	var texts []string
	for _, r := range rules {
		texts = append(texts, r.comment)
	}
	return texts, err
}

// elements are a set's, and whether there is such a set.
func elements(c *nftables.Conn, set *nftables.Set) ([]nftables.SetElement, bool, error) {
	all, err := c.GetSetElements(set)
	if gone(err) {
		return nil, false, nil
	}
	return all, err == nil, err
}

// wholes are a set's or a map's elements, each as its entry's whole.
func wholes(elements []nftables.SetElement, verdicts bool) map[string]bool {
	wholes := map[string]bool{}
	for _, e := range elements {
		value := e.Val
		if verdicts {
			value = verdictChain(e.Val)
		}
		wholes[string(slices.Concat(e.Key, e.KeyEnd, value))] = true
	}
	return wholes
}

// verdictChain is the chain that a verdict leads to. The library leaves its attributes
// as the kernel writes them.
func verdictChain(attributes []byte) []byte {
	for len(attributes) >= unix.SizeofNlAttr {
		size := int(binaryutil.NativeEndian.Uint16(attributes))
		if size < unix.SizeofNlAttr || size > len(attributes) {
			return nil
		}
		if binaryutil.NativeEndian.Uint16(attributes[2:])&0x3fff == unix.NFTA_VERDICT_CHAIN {
			return bytes.TrimRight(attributes[unix.SizeofNlAttr:size], "\x00")
		}
		attributes = attributes[min((size+3)&^3, len(attributes)):]
	}
	return nil
}

// gone says whether the kernel does not know a table, chain or set. The library
// does not wrap each error, so the text has to do.
func gone(err error) bool {
	return err != nil && (errors.Is(err, unix.ENOENT) || strings.HasSuffix(err.Error(), unix.ENOENT.Error()))
}
