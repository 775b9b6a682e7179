package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"ingot/internal/dhcp"
)

// dhcpLeaseListCommand shows a lease log as isc-dhcp-server's script of that name
// does. It runs on the hub's machine and reads the file, not the service.
func dhcpLeaseListCommand() *cobra.Command {
	var file string
	var all, last, parsable bool
	cmd := &cobra.Command{
		Use:    "dhcp-lease-list",
		Short:  "Show the DHCP leases of this machine's lease log (also: dhcp-leases-list)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			leases, err := dhcp.ReadLeases(file)
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if !all && !last {
				leases = slices.DeleteFunc(leases, func(l dhcp.Lease) bool { return l.State != dhcp.Active })
			}
			if parsable {
				for _, l := range leases {
					fmt.Fprintf(w, "MAC %s IP %s HOSTNAME %s BEGIN %s END %s MANUFACTURER -NA-\n",
						l.MAC, l.IP, cmp.Or(l.Hostname, "-NA-"), l.Starts.UTC().Format(time.DateTime), l.Ends.UTC().Format(time.DateTime))
				}
				return nil
			}
			fmt.Fprintf(w, "Reading leases from %s\n", file)
			fmt.Fprintf(w, "%-18s %-15s %-14s %-19s %s\n", "MAC", "IP", "hostname", "valid until", "manufacturer")
			fmt.Fprintln(w, "===============================================================================================")
			for _, l := range leases {
				fmt.Fprintf(w, "%-18s %-15s %-14s %-19s %s\n", l.MAC, l.IP, cmp.Or(l.Hostname, "-NA-"), l.Ends.UTC().Format(time.DateTime), "-NA-")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "lease", "/var/lib/dhcp/dhcpd.leases", "the lease log")
	cmd.Flags().BoolVar(&all, "all", false, "with leases that have ended")
	cmd.Flags().BoolVar(&last, "last", false, "the same: the log has one lease of each card")
	cmd.Flags().BoolVar(&parsable, "parsable", false, "a line of words and values for each lease, for scripts")
	return cmd
}
