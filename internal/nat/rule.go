package nat

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// kernelRule is a rule that is in force, ours or another's. The library reads all of a
// chain's rules or, for one that it can't read, none; and leaves out of a rule what it
// does not know, so that the rule seems to be about more packets than it is.
type kernelRule struct {
	handle  uint64
	comment string
	written []byte // its expressions, as the kernel has them
}

// kernelRules are a chain's, none if there is no such chain.
func kernelRules(chain *nftables.Chain) ([]kernelRule, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	which, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(chain.Table.Name + "\x00")}, {Type: unix.NFTA_RULE_CHAIN, Data: []byte(chain.Name + "\x00")},
	})
	if err != nil {
		return nil, err
	}
	family := []byte{byte(chain.Table.Family), 0, 0, 0} // struct nfgenmsg
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append(family, which...),
	})
	if err != nil && !gone(err) {
		return nil, err
	}
	var rules []kernelRule
	for _, m := range messages {
		var r kernelRule
		err := attributes(m.Data[len(family):], func(a *netlink.AttributeDecoder) {
			switch a.Type() {
			case unix.NFTA_RULE_HANDLE:
				r.handle = a.Uint64()
			case unix.NFTA_RULE_USERDATA:
				r.comment, _ = userdata.GetString(a.Bytes(), userdata.TypeComment)
			case unix.NFTA_RULE_EXPRESSIONS:
				r.written = a.Bytes()
			}
		})
		if err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// expressions are what a rule asks for and does, in order: nil is something that is not
// known here.
func (r kernelRule) expressions() (all []expr.Any) {
	attributes(r.written, func(one *netlink.AttributeDecoder) {
		var name string
		var data []byte
		attributes(one.Bytes(), func(a *netlink.AttributeDecoder) {
			switch a.Type() {
			case unix.NFTA_EXPR_NAME:
				name = a.String()
			case unix.NFTA_EXPR_DATA:
				data = a.Bytes()
			}
		})
		all = append(all, expression(name, data))
	})
	return all
}

func expression(name string, data []byte) expr.Any {
	var e expr.Any
	switch name {
	case "bitwise":
		e = &expr.Bitwise{}
	case "cmp":
		e = &expr.Cmp{}
	case "counter":
		e = &expr.Counter{}
	case "ct":
		e = &expr.Ct{}
	case "immediate":
		e = &expr.Immediate{}
	case "log":
		e = &expr.Log{}
	case "lookup":
		e = &expr.Lookup{}
	case "match":
		e = &expr.Match{}
	case "meta":
		e = &expr.Meta{}
	case "reject":
		e = &expr.Reject{}
	case "target":
		e = &expr.Target{}
	default:
		return nil
	}
	err := expr.Unmarshal(unix.NFPROTO_IPV4, data, e)
	if to, ok := e.(*expr.Immediate); ok && to.Register == unix.NFT_REG_VERDICT && err == nil {
		e = &expr.Verdict{}
		err = expr.Unmarshal(unix.NFPROTO_IPV4, data, e)
	}
	if err != nil {
		return nil // such as what is asked of a connection in one direction
	}
	return e
}

// attributes has f see each attribute of a message of nftables'.
func attributes(message []byte, f func(*netlink.AttributeDecoder)) error {
	a, err := netlink.NewAttributeDecoder(message)
	if err != nil {
		return err
	}
	a.ByteOrder = binary.BigEndian
	for a.Next() {
		f(a)
	}
	return a.Err()
}
