package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
)

// leaseView is a lease as `-o json` shows it. docs/json.md describes it.
type leaseView struct {
	IP       string     `json:"ip"`
	MAC      string     `json:"mac"`
	Hostname string     `json:"hostname"`
	State    string     `json:"state"`
	MicroVM  string     `json:"microvm"`   // NAMESPACE/NAME, empty if it is nobody's
	Reserved bool       `json:"reserved"`  // the address is kept for the client
	ClientID string     `json:"client_id"` // bytes, as 01:0a:ff; empty if it told none
	Starts   *time.Time `json:"starts"`
	Ends     *time.Time `json:"ends"`
}

func leaseCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "lease", Short: "The addresses that the hub gives"}
	cmd.AddCommand(leaseListCommand(), leaseShowCommand(), leaseWatchCommand(), leaseReleaseCommand(), leaseReserveCommand(), leaseUnreserveCommand(), leaseImportCommand())
	return cmd
}

func leaseListCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List leases",
		Args:    cobra.NoArgs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			views, err := c.leaseViews(cmd.Context())
			if err != nil {
				return err
			}
			return out.write(cmd.OutOrStdout(), views, func(w io.Writer) error { return leaseTable(w, views) })
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

func leaseTable(w io.Writer, views []leaseView) error {
	rows := make([][]string, len(views))
	for i, v := range views {
		rows[i] = v.row()
	}
	return table(w, "IP MAC HOSTNAME STATE ENDS(UTC) RESERVED MICROVM", rows)
}

func (v leaseView) row() []string {
	ends := ""
	if v.Ends != nil {
		ends = v.Ends.Format("2006-01-02 15:04:05")
	}
	reserved := ""
	switch {
	case v.Reserved && v.MAC == "" && v.ClientID != "":
		reserved = "id:" + v.ClientID // or nobody could say for whom
	case v.Reserved:
		reserved = "yes"
	}
	return []string{v.IP, v.MAC, v.Hostname, v.State, ends, reserved, v.MicroVM}
}

func leaseShowCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:   "show IP|MAC|HOSTNAME|NAMESPACE/NAME",
		Short: "Show one lease",
		Args:  cobra.ExactArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			v, err := c.lease(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return out.write(cmd.OutOrStdout(), v, func(w io.Writer) error { return leaseTable(w, []leaseView{v}) })
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

func leaseReleaseCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "release IP|MAC|HOSTNAME|NAMESPACE/NAME",
		Short: "Give an address back",
		Args:  cobra.ExactArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			ctx := cmd.Context()
			v, err := c.lease(ctx, args[0])
			if err != nil {
				return err
			}
			if _, err := c.hub.ReleaseLease(ctx, &ingotv1.ReleaseLeaseRequest{Ip: v.IP}); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), v.IP)
			return nil
		}),
	}
}

func leaseReserveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reserve MAC|[NAMESPACE/]NAME [IP]",
		Short: "Keep an address for a card, or for a microVM whatever its card is; without IP the one that it has, or a free one",
		Args:  cobra.RangeArgs(1, 2),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			r := &ingotv1.ReserveRequest{}
			var err error
			if r.Mac, r.Microvm, err = c.client(cmd.Context(), args[0]); err != nil {
				return err
			}
			if len(args) > 1 {
				r.Ip = args[1]
			}
			l, err := c.hub.Reserve(cmd.Context(), r)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), l.GetIp())
			return nil
		}),
	}
}

func leaseUnreserveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unreserve MAC|IP|[NAMESPACE/]NAME",
		Short: "Keep an address for nobody any more; who has it now goes on",
		Args:  cobra.ExactArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			r := &ingotv1.UnreserveRequest{Ip: args[0]}
			if _, err := netip.ParseAddr(args[0]); err != nil {
				r.Ip = ""
				if r.Mac, r.Microvm, err = c.client(cmd.Context(), args[0]); err != nil {
					return err
				}
			}
			if _, err := c.hub.Unreserve(cmd.Context(), r); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), args[0])
			return nil
		}),
	}
}

// client is whom a person means: a card by its MAC, or a microVM, which need not be there
// if it is named in full.
func (c *cloud) client(ctx context.Context, wanted string) (mac, microVM string, err error) {
	if mac, err := net.ParseMAC(wanted); err == nil {
		return mac.String(), "", nil
	}
	if strings.Contains(wanted, "/") {
		return "", wanted, nil
	}
	owner, err := c.find(ctx, wanted)
	if err != nil {
		return "", "", err
	}
	return "", owner.GetSpec().GetNamespace() + "/" + owner.GetSpec().GetId(), nil
}

// leaseViews is all leases, by address, with the microVMs that they are of.
func (c *cloud) leaseViews(ctx context.Context) ([]leaseView, error) {
	r, err := c.hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	views := make([]leaseView, len(r.GetLeases()))
	for i, l := range r.GetLeases() {
		views[i] = viewLease(l)
	}
	slices.SortFunc(views, func(a, b leaseView) int {
		x, _ := netip.ParseAddr(a.IP)
		y, _ := netip.ParseAddr(b.IP)
		return cmp.Or(x.Compare(y), cmp.Compare(a.MAC, b.MAC))
	})
	return views, nil
}

func viewLease(l *ingotv1.Lease) leaseView {
	return leaseView{
		IP: l.GetIp(), MAC: l.GetMac(), Hostname: l.GetHostname(), State: l.GetState(), MicroVM: l.GetMicrovm(), Reserved: l.GetReserved(),
		ClientID: net.HardwareAddr(l.GetClientId()).String(), Starts: when(l.GetStarts()), Ends: when(l.GetEnds()),
	}
}

// lease is the one that a person means by an address, a MAC, a host name or the
// name of a microVM.
func (c *cloud) lease(ctx context.Context, wanted string) (leaseView, error) {
	views, err := c.leaseViews(ctx)
	if err != nil {
		return leaseView{}, err
	}
	var found []leaseView
	for _, v := range views {
		named := v.MicroVM != "" && (v.MicroVM == wanted || v.MicroVM == defaultNamespace+"/"+wanted)
		if v.IP == wanted || strings.EqualFold(v.MAC, wanted) || v.Hostname == wanted || named {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return leaseView{}, fmt.Errorf("find lease %s: %w; `ingot lease list` shows what there is", wanted, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	var which []string
	for _, v := range found {
		which = append(which, v.IP)
	}
	return leaseView{}, fmt.Errorf("find lease %s: %w: it could be %s", wanted, errdefs.ErrInvalidArgument, strings.Join(which, ", or "))
}
