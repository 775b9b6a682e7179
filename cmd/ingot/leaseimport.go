package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/dhcp"
)

func leaseImportCommand() *cobra.Command {
	var config, leases string
	cmd := &cobra.Command{
		Use:   "import [--config dhcpd.conf] [--leases dhcpd.leases]",
		Short: "Take over what an isc-dhcp-server has given, and its configuration",
		Long: `Take over what an isc-dhcp-server has given, and its configuration.

Its clients keep their addresses: leases and hosts with a fixed address become the
hub's. What has ended is remembered. Subnets, ranges, options and lease times are
taken beside those of the environment's file, which goes before; the hub starts again
with them. What can't be taken over is said, with its line. To import again changes
nothing; an empty configuration takes an imported one away.

Stop the old server first: its files do not change then.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if config == "" && leases == "" {
				return misused(cmd, "there is nothing to import: --config, --leases or both say what")
			}
			return withCloud(cmd, func(c *cloud) error { return c.importLeases(cmd.Context(), cmd.OutOrStdout(), config, leases) })
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the old server's dhcpd.conf")
	cmd.Flags().StringVar(&leases, "leases", "", "the old server's dhcpd.leases")
	return cmd
}

func (c *cloud) importLeases(ctx context.Context, w io.Writer, config, leases string) error {
	var all []*ingotv1.Lease
	if config != "" {
		text, err := os.ReadFile(config)
		if err != nil {
			return fmt.Errorf("read dhcpd's configuration: %w", err)
		}
		d, err := dhcp.ParseDhcpd(string(text))
		if err != nil {
			return fmt.Errorf("%s: %w", config, err)
		}
		all = append(all, reservations(d.Reservations)...)
		if err := c.importConfig(ctx, w, config, string(text)); err != nil {
			return err
		}
	}
	reserved := len(all)
	if leases != "" {
		// dhcpd has hosts there, too, that were made while it ran (OMAPI).
		hosts, err := dhcp.ReadReservations(leases)
		if err != nil {
			return err
		}
		all = append(all, reservations(hosts)...)
		reserved = len(all)
		given, err := dhcp.ReadLeases(leases)
		if err != nil {
			return err
		}
		for _, l := range given {
			all = append(all, &ingotv1.Lease{
				Ip: l.IP.String(), Mac: l.MAC.String(), ClientId: l.ClientID, Hostname: l.Hostname, State: l.State,
				Starts: timestamppb.New(l.Starts), Ends: timestamppb.New(l.Ends),
			})
		}
	}
	left, err := c.sendLeases(ctx, all)
	if err != nil {
		return fmt.Errorf("import leases: %w", err)
	}
	for _, l := range left {
		fmt.Fprintf(w, "not taken over: %s of %s: %s\n", l.GetIp(), l.GetMac(), l.GetReason())
	}
	fmt.Fprintf(w, "%d leases and %d reservations read, %d not taken over\n", len(all)-reserved, reserved, len(left))
	return nil
}

func reservations(all []dhcp.Reservation) []*ingotv1.Lease {
	var m []*ingotv1.Lease
	for _, r := range all {
		m = append(m, &ingotv1.Lease{Ip: r.IP.String(), Mac: r.MAC.String(), ClientId: r.ClientID, Hostname: r.Name, Microvm: r.MicroVM, State: dhcp.Reserved})
	}
	return m
}

// importConfig gives the hub a configuration, and returns once it serves with it.
func (c *cloud) importConfig(ctx context.Context, w io.Writer, file, text string) error {
	before, err := c.hub.Facts(ctx, &emptypb.Empty{})
	if err != nil {
		return fmt.Errorf("import configuration: %w", err)
	}
	began := beginning(before)
	r, err := c.hub.ConfigureDHCP(ctx, &ingotv1.ConfigureDHCPRequest{Config: text})
	if err != nil {
		return fmt.Errorf("import configuration: %w", err)
	}
	for _, l := range r.GetLeft() {
		fmt.Fprintf(w, "not taken over: %s:%d: %s: %s\n", file, l.GetLine(), l.GetText(), l.GetReason())
	}
	if !r.GetChanged() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, longestStart)
	defer cancel()
	for {
		f, err := c.hub.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true))
		if ctx.Err() != nil {
			return fmt.Errorf("wait until the hub serves with its new configuration: %w", ctx.Err())
		}
		if err == nil && beginning(f).Sub(began) > time.Second/20 { // it is not the one that ends
			return nil
		}
	}
}

// longestStart is how long a hub may take to serve again.
const longestStart = 30 * time.Second

// beginning is when a hub began.
func beginning(f *ingotv1.HubFacts) time.Time { return time.Now().Add(-f.GetUptime().AsDuration()) }

// leasesAtOnce is how many leases go into one message.
const leasesAtOnce = 10_000

func (c *cloud) sendLeases(ctx context.Context, all []*ingotv1.Lease) (left []*ingotv1.NotImported, err error) {
	for part := range slices.Chunk(all, leasesAtOnce) {
		r, err := c.hub.ImportLeases(ctx, &ingotv1.ImportLeasesRequest{Leases: part})
		if err != nil {
			return nil, err
		}
		left = append(left, r.GetLeft()...)
	}
	return left, nil
}
