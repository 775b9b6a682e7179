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
	MicroVM  string     `json:"microvm"` // NAMESPACE/NAME, empty if it is nobody's
	Starts   *time.Time `json:"starts"`
	Ends     *time.Time `json:"ends"`
}

func leaseCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "lease", Short: "Look at the addresses that the hub has given"}
	cmd.AddCommand(leaseListCommand(), leaseShowCommand(), leaseReleaseCommand())
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
		ends := ""
		if v.Ends != nil {
			ends = v.Ends.Format("2006-01-02 15:04:05")
		}
		rows[i] = []string{v.IP, v.MAC, v.Hostname, v.State, ends, v.MicroVM}
	}
	return table(w, "IP MAC HOSTNAME STATE ENDS(UTC) MICROVM", rows)
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
				return fmt.Errorf("release %s: %w", v.IP, err)
			}
			fmt.Fprintln(cmd.OutOrStdout(), v.IP)
			return nil
		}),
	}
}

// leaseViews is all leases, by address, with the microVMs that they are of.
func (c *cloud) leaseViews(ctx context.Context) ([]leaseView, error) {
	owners := make(chan map[string]string, 1)
	go func() { owners <- c.owners(ctx) }()
	r, err := c.hub.ListLeases(ctx, &ingotv1.ListLeasesRequest{})
	owner := <-owners
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	views := make([]leaseView, len(r.GetLeases()))
	for i, l := range r.GetLeases() {
		mac, _ := net.ParseMAC(l.GetMac())
		views[i] = leaseView{l.GetIp(), l.GetMac(), l.GetHostname(), l.GetState(), owner[mac.String()], when(l.GetStarts()), when(l.GetEnds())}
	}
	slices.SortFunc(views, func(a, b leaseView) int {
		x, _ := netip.ParseAddr(a.IP)
		y, _ := netip.ParseAddr(b.IP)
		return cmp.Or(x.Compare(y), cmp.Compare(a.MAC, b.MAC))
	})
	return views, nil
}

// owners is the microVMs by their MAC addresses, as far as their hosts answer.
func (c *cloud) owners(ctx context.Context) map[string]string {
	vms, _ := c.list(ctx, "")
	owners := map[string]string{}
	for _, vm := range vms {
		for _, i := range vm.GetStatus().GetNetworkInterfaces() {
			if mac, err := net.ParseMAC(i.GetGuestMac()); err == nil {
				owners[mac.String()] = vm.GetSpec().GetNamespace() + "/" + vm.GetSpec().GetId()
			}
		}
	}
	return owners
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
