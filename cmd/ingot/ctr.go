package main

import (
	"github.com/spf13/cobra"

	"ingot/internal/image/daemon"
)

// ctrCommand is containerd's own command line. It parses its flags itself.
func ctrCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "ctr",
		Short:              "containerd's command line, as the name ctr gives it",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if code := daemon.CTR(cmd.Context(), append([]string{"ctr"}, args...)); code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
}
