package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ingot/internal/rpc"
)

// daemonName is flintlock's daemon's, which ours takes the place of in unit files.
const daemonName = "flintlockd"

// daemonCommand is what the program is by the daemon's name.
func daemonCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           daemonName,
		Short:         "The microVM host's daemon, in the place of flintlock's",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	for _, key := range []string{"verbosity", "log-format", "log-output"} { // flintlock has them before `run` too
		if s, ok := settingOf(key); ok {
			s.add(root.PersistentFlags())
		}
	}
	run := hostCommand()
	run.Use, run.Short = "run", "Run the microVM host's daemon in the foreground"
	root.AddCommand(run, daemonVersionCommand())
	return root
}

// daemonVersionCommand says it in flintlock's words.
func daemonVersionCommand() *cobra.Command {
	var long, short bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the version of flintlock that this program stands in for, and its own",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, b := cmd.OutOrStdout(), buildInfo()
			switch {
			case long && short:
				return misused(cmd, "--long and --short exclude each other")
			case short:
				fmt.Fprintln(w, rpc.FlintlockVersion)
			case long:
				fmt.Fprintf(w, "flintlock %s\n  Version:    %s\n  Ingot:      %s\n  CommitHash: %s\n  BuildDate:  %s\n", rpc.FlintlockVersion, rpc.FlintlockVersion, b.Version, b.Revision, b.Date)
			default:
				fmt.Fprintf(w, "flintlock %s (ingot %s)\n", rpc.FlintlockVersion, b.Version)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&long, "long", false, "all that is known")
	cmd.Flags().BoolVar(&short, "short", false, "the version alone")
	return cmd
}
