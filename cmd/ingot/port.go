package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
)

// portView is a published port as `-o json` shows it. docs/json.md describes it.
type portView struct {
	MicroVM      string   `json:"microvm"` // NAMESPACE/NAME
	UID          string   `json:"uid"`
	Protocol     string   `json:"protocol"`
	Address      string   `json:"address"` // the hub's; empty: each that it has outside
	Port         int      `json:"port"`
	To           int      `json:"to"`
	GuestAddress string   `json:"guest_address"` // empty: it has none now
	ReachedAt    []string `json:"reached_at"`
}

func portCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "port", Short: "Ports of the hub that lead to microVMs"}
	cmd.AddCommand(portPublishCommand(), portListCommand(), portUnpublishCommand())
	return cmd
}

func portPublishCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "publish [NAMESPACE/]NAME [ADDRESS:]PORT:TO[/udp]…",
		Short: "Have ports of the hub lead to a microVM, until it is deleted",
		Long: `Have ports of the hub lead to a microVM: what comes to PORT of the hub, at ADDRESS or
at each that it has outside, goes to the microVM's port TO. It is so until the microVM
is deleted, whichever address it has. All are published, or none.`,
		Example:           "  ingot port publish vm-0 8080:80 5353:53/udp",
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ports, err := readPorts(cmd, args[1:], nat.ParsePort)
			if err != nil {
				return err
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				at, err := c.publish(cmd.Context(), vm, ports)
				if err != nil {
					return err
				}
				for _, line := range at {
					fmt.Fprintln(cmd.OutOrStdout(), line)
				}
				return nil
			})
		},
	}
}

// readPorts reads the ports that a person means, and says all that is wrong with them.
func readPorts(cmd *cobra.Command, texts []string, parse func(string) (nat.Port, error)) ([]*ingotv1.Port, error) {
	var ports []*ingotv1.Port
	var wrong []error
	for _, text := range texts {
		p, err := parse(text)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		ports = append(ports, portMessage(p))
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, misused(cmd, "%w", err)
	}
	return ports, nil
}

func portMessage(p nat.Port) *ingotv1.Port {
	m := &ingotv1.Port{Protocol: p.Protocol, Port: uint32(p.Port), To: uint32(p.To)}
	if p.Address.IsValid() {
		m.Address = p.Address.String()
	}
	return m
}

// publish leads ports to a microVM, and says where they are reached.
func (c *cloud) publish(ctx context.Context, vm microVM, ports []*ingotv1.Port) (at []string, err error) {
	if len(ports) == 0 {
		return nil, nil
	}
	r, err := c.hub.PublishPorts(ctx, &ingotv1.PublishPortsRequest{Uid: vm.uid(), Ports: ports})
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		for _, reached := range reachedAt(p, r.GetAddresses()) {
			at = append(at, fmt.Sprintf("%s/%s -> %s:%d", reached, p.GetProtocol(), vm, p.GetTo()))
		}
	}
	return at, nil
}

// publishable says why ports can't be published; nil: they can. Later they may be another's.
func (c *cloud) publishable(ctx context.Context, ports []*ingotv1.Port) error {
	if len(ports) == 0 {
		return nil
	}
	_, err := c.hub.PublishPorts(ctx, &ingotv1.PublishPortsRequest{Ports: ports})
	return err
}

// reachedAt is where a port is reached, by the hub's addresses outside.
func reachedAt(p *ingotv1.Port, addresses []string) []string {
	if p.GetAddress() != "" {
		addresses = []string{p.GetAddress()}
	}
	all := []string{}
	for _, a := range addresses {
		all = append(all, net.JoinHostPort(a, strconv.Itoa(int(p.GetPort()))))
	}
	return all
}

func portListCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:               "list [NAMESPACE/]NAME…",
		Aliases:           []string{"ls"},
		Short:             "List published ports, all or those of some microVMs",
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			vms, err := c.findAll(cmd.Context(), args)
			if err != nil {
				return err
			}
			r, err := c.hub.ListPorts(cmd.Context(), &ingotv1.ListPortsRequest{})
			if err != nil {
				return fmt.Errorf("list ports: %w", err)
			}
			views := []portView{}
			for _, p := range r.GetPorts() {
				if len(args) > 0 && !slices.ContainsFunc(vms, func(vm microVM) bool { return vm.uid() == p.GetUid() }) {
					continue
				}
				views = append(views, portView{
					MicroVM: p.GetNamespace() + "/" + p.GetName(), UID: p.GetUid(), Protocol: p.GetPort().GetProtocol(), Address: p.GetPort().GetAddress(),
					Port: int(p.GetPort().GetPort()), To: int(p.GetPort().GetTo()), GuestAddress: p.GetGuestAddress(), ReachedAt: reachedAt(p.GetPort(), r.GetAddresses()),
				})
			}
			return out.write(cmd.OutOrStdout(), views, func(w io.Writer) error { return portTable(w, views) })
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

func portTable(w io.Writer, views []portView) error {
	rows := make([][]string, len(views))
	for i, v := range views {
		guest := ""
		if ip, err := netip.ParseAddr(v.GuestAddress); err == nil {
			guest = netip.AddrPortFrom(ip, uint16(v.To)).String()
		}
		rows[i] = []string{strings.Join(v.ReachedAt, ","), v.Protocol, v.MicroVM, strconv.Itoa(v.To), guest}
	}
	return table(w, "REACHED-AT PROTOCOL MICROVM PORT GUEST", rows)
}

func portUnpublishCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:               "unpublish [NAMESPACE/]NAME [ADDRESS:]PORT[/udp]…",
		Short:             "Take ports away from a microVM, and end the connections that came by them",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all != (len(args) == 1) {
				return misused(cmd, "name the ports, or say --all")
			}
			ports, err := readPorts(cmd, args[1:], func(text string) (nat.Port, error) {
				if p, err := nat.ParsePort(text); err == nil {
					return p, nil
				}
				return nat.ParseOutside(text)
			})
			if err != nil {
				return err
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				_, err = c.hub.UnpublishPorts(cmd.Context(), &ingotv1.UnpublishPortsRequest{Uid: vm.uid(), Ports: ports})
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all that it has")
	return cmd
}
