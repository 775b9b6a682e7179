package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"ingot/internal/env"
)

func upCommand() *cobra.Command {
	var o env.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring the environment up, or complete it",
		Long: `Bring the environment up: a network hub and two microVM hosts on this machine,
with two microVMs the first time. What is as it should be is left alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Out = cmd.ErrOrStderr()
			e, err := env.Up(cmd.Context(), environment(cmd), o)
			if err != nil {
				return err
			}
			return outputs(cmd.OutOrStdout(), e)
		},
	}
	cmd.Flags().BoolVar(&o.NoVMs, "no-vms", false, "don't make the first microVMs")
	cmd.Flags().DurationVar(&o.Wait, "wait", 0, "how long to wait until all is green (default 3m)")
	return cmd
}

// outputs says where things are, in the form that people know from terraform.
func outputs(w io.Writer, e env.Env) error {
	var hosts []string
	for _, m := range e.Hosts() {
		hosts = append(hosts, fmt.Sprintf("  %q = %q", m.Name, m.Address))
	}
	_, err := fmt.Fprintf(w, "network_hub_ip = %q\nmicrovm_host_ips = {\n%s\n}\n\nNext: ingot ps\n      ingot run --rm -it busybox -- sh\n      ingot inspect\n",
		e.Hub().Address, strings.Join(hosts, "\n"))
	return err
}

func downCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove the environment, its microVMs and all its traces",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return env.Down(cmd.Context(), environment(cmd), cmd.ErrOrStderr())
		},
	}
}
