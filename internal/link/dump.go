package link

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumps is how often a list is asked for: each is short, and it takes many
// changes to meet all of them.
const dumps = 100

// dump asks the kernel for a list, and again if the list changed meanwhile: what
// it gives then may lack some, or have some twice (NLM_F_DUMP_INTR of netlink(7)).
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumps {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}
