package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ingot/internal/env"
)

func upCommand() *cobra.Command {
	var o env.Options
	var file string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring the environment up, complete it, or make it what its file says",
		Long: `Bring the environment up: a network hub and two microVM hosts on this machine,
with two microVMs the first time; or what a file says, that ` + "`ingot init`" + ` writes.
What is as it should be is left alone. The file is kept: without one, the next
` + "`ingot up`" + ` goes by it. The environment's name is --name, else the file's, else lab.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			name := environment(cmd)
			if file != "" {
				d, err := readDeclaration(file)
				if err != nil {
					return err
				}
				o.Declared = &d
				name = cmp.Or(chosenEnvironment(cmd), d.Name, name)
				_ = cmd.Flags().Set("name", name) // for the hints in an error
			}
			o.Out = hints{cmd.ErrOrStderr(), name}
			if o.DryRun {
				o.Plan = cmd.OutOrStdout()
			}
			e, err := env.Up(cmd.Context(), name, o)
			if err != nil || o.DryRun {
				return err
			}
			return outputs(cmd.OutOrStdout(), e)
		},
	}
	nameFlag(cmd)
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "what the environment is to be; - is standard input")
	f.BoolVar(&o.DryRun, "dry-run", false, "show what would change, and change nothing")
	f.BoolVar(&o.Force, "force", false, "also what loses disks: make microVMs anew, remove machines with microVMs")
	f.BoolVar(&o.NoVMs, "no-vms", false, "don't make the first microVMs, now or later")
	f.DurationVar(&o.Wait, "wait", 0, "how long to wait until all is green (default 3m)")
	return cmd
}

// readDeclaration reads an environment's file.
func readDeclaration(file string) (env.Declaration, error) {
	read := func() ([]byte, error) { return os.ReadFile(file) }
	if file == "-" {
		file, read = "standard input", func() ([]byte, error) { return io.ReadAll(os.Stdin) }
	}
	b, err := read()
	if err != nil {
		return env.Declaration{}, fmt.Errorf("read environment: %w", err)
	}
	return env.Parse(file, b)
}

// outputs says where things are, in the form that people know from terraform.
func outputs(w io.Writer, e env.Env) error {
	var hosts []string
	for _, m := range e.Hosts() {
		hosts = append(hosts, fmt.Sprintf("  %q = %q", m.Name, m.Address))
	}
	_, err := fmt.Fprintf(w, "network_hub_ip = %q\nmicrovm_host_ips = {\n%s\n}\n\nNext: %[3]s ps\n      %[3]s run --rm -it busybox -- sh\n      %[3]s inspect\n",
		e.Hub().Address, strings.Join(hosts, "\n"), program(e.Name))
	return err
}

func downCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Remove the environment, its microVMs and all its traces",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return env.Down(cmd.Context(), environment(cmd), cmd.ErrOrStderr())
		},
	}
	nameFlag(cmd)
	return cmd
}

// nameFlag is what --env is called where environments come and go.
func nameFlag(cmd *cobra.Command) {
	cmd.Flags().String("name", "", "the environment's name (the same as --env)")
	_ = cmd.Flags().SetAnnotation("name", ofEnvironment, []string{"true"})
}

// ofEnvironment marks a --name as an environment's: others are microVMs'.
const ofEnvironment = "environment"
