package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"ingot/internal/hub"
)

func hubExportCommand() *cobra.Command {
	var config string
	var images bool
	cmd := &cobra.Command{
		Use:   "export FILE",
		Short: "Write all that makes this machine's hub to an archive; - is standard output",
		Long: `Write all that makes this machine's hub to an archive; - is standard output.

It has the hub's configuration, certificate and token, its leases and reservations, and
the VPN's key and peers: keep it as you keep a key. Stop the hub first where another
machine is to take its place at once; else what it does later is not in the archive.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := hub.ReadConfig(config, buildInfo().Version)
			if err != nil {
				return err
			}
			if args[0] == "-" {
				return hub.Export(cmd.OutOrStdout(), c, images)
			}
			f, err := os.OpenFile(args[0], os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return fmt.Errorf("export the hub: %w", err)
			}
			err = hub.Export(f, c, images)
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				return errors.Join(fmt.Errorf("export the hub: %w", err), os.Remove(args[0]))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", hubConfigFile, "configuration file")
	cmd.Flags().BoolVar(&images, "images", false, "the registry's images, too")
	return cmd
}

func hubImportCommand() *cobra.Command {
	var config string
	var replaced bool
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Make this machine's hub what an archive says; - is standard input",
		Long: `Make this machine's hub what an archive of ` + "`ingot hub export`" + ` says; - is standard input.

The hub must not run meanwhile. Its configuration, certificate and token stay if there
are any here already, as on a machine that ` + "`ingot up`" + ` has set up. If it is interrupted,
repeat it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			from := io.Reader(cmd.InOrStdin())
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("import a hub: %w", err)
				}
				defer f.Close()
				from = f
			}
			stays, err := hub.Import(cmd.Context(), from, config, buildInfo().Version, replaced)
			if err != nil {
				return fmt.Errorf("import a hub: %w", err)
			}
			for _, path := range stays {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s was here already and stays\n", path)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", hubConfigFile, "configuration file")
	cmd.Flags().BoolVar(&replaced, "replace", false, "also if this hub has leases, reservations or VPN peers, which it then forgets")
	return cmd
}

func hubClearCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "clear",
		Short: "Take back what a hub that has ended leaves in force on its machine",
		Long: `Take back what a hub that has ended leaves in force on its machine: nftables rules,
forwarding, what firewalld was told, the VPN's interface. Its files stay.

A hub that ends leaves these so that microVMs notice nothing of its restart.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := hub.ReadConfig(config, buildInfo().Version)
			if err != nil {
				return err
			}
			return hub.Clear(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&config, "config", hubConfigFile, "configuration file")
	return cmd
}
