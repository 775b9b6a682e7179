package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"ingot/internal/hub"
	"ingot/internal/logline"
	"ingot/internal/web"
)

// hubConfigFile is where a hub's configuration is, unless something else is said.
const hubConfigFile = "/etc/ingot/hub.yaml"

// hubCommand runs the network hub in the foreground.
func hubCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "hub",
		Short: "Run the network hub: DHCP, DNS, NAT, VPN and the image registry",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := hub.ReadConfig(file, buildInfo().Version)
			if err != nil {
				return err
			}
			log := logline.New(os.Stderr, logline.Text, slog.LevelInfo)
			h, err := hub.New(c, log)
			if err != nil {
				return err
			}
			if !c.Metrics.IsValid() {
				return h.Run(cmd.Context())
			}
			b := buildInfo()
			return h.Run(cmd.Context(), web.NewHub(b.Version, b.Revision, log).Serve(c.Metrics.String(), web.HubSource{Hub: h}))
		},
	}
	cmd.Flags().StringVar(&file, "config", hubConfigFile, "configuration file")
	cmd.AddCommand(hubExportCommand(), hubImportCommand(), hubClearCommand())
	return cmd
}
