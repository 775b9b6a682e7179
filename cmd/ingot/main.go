// Command ingot turns Linux machines into a microVM cloud: it brings an
// environment up and inspects it, is every role of it (network hub, microVM
// host, containerd), and talks to it. It also answers to the names flintlockd,
// ctr, dhcp-lease-list and dhcp-leases-list.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"ingot/internal/env"
)

func main() {
	os.Exit(Main())
}

// Main runs the command line and returns the exit code: 0 done, 1 not done,
// 2 misused; a command that runs another's (exec, run -it) returns that one's.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	who, root := "ingot", rootCommand()
	if len(os.Args) > 0 && filepath.Base(os.Args[0]) == daemonName {
		who, root = daemonName, daemonCommand()
	}
	root.SetArgs(arguments(os.Args))
	cmd, err := execute(ctx, root)
	return report(err, who, environment(cmd))
}

// report says, as the program is called, what went wrong in an environment and returns
// the exit code that it means.
func report(err error, who, name string) int {
	var code exitCode
	var misuse *usageError
	var objections env.Objections
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &misuse):
		fmt.Fprintf(os.Stderr, "%s: %s\nSee '%s --help'.\n", who, pasteable(misuse.Error(), name), misuse.command)
		return 2
	case errors.As(err, &objections): // a line each: there may be many
		for _, one := range objections {
			fmt.Fprintln(os.Stderr, who+":", explain(one, name))
		}
		return 1
	}
	fmt.Fprintln(os.Stderr, who+":", explain(err, name))
	return 1
}

// exitCode is the error of a command that has said all there is to say, and
// only wants its exit code.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// arguments are those of the command line, after the command that the
// program's own name stands for: the page's scripts call these names.
func arguments(argv []string) []string {
	if len(argv) == 0 {
		return nil
	}
	args := argv[1:]
	switch filepath.Base(argv[0]) {
	case "ctr":
		return append([]string{"ctr"}, args...)
	case "dhcp-lease-list", "dhcp-leases-list":
		return append([]string{"dhcp-lease-list"}, args...)
	case daemonName:
		if len(args) == 0 || slices.Contains([]string{"-h", "--help", "help"}, args[0]) {
			return []string{"run", "--help"}
		}
	}
	return args
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:               "ingot",
		Short:             "A microVM cloud from ordinary Linux machines",
		SilenceUsage:      true,
		SilenceErrors:     true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return checkEnvironment(cmd) },
	}
	root.PersistentFlags().String("env", "", "environment (default: $INGOT_ENV, else lab)")
	root.AddCommand(
		// The environment.
		initCommand(),
		upCommand(),
		downCommand(),
		inspectCommand(),
		doctorCommand(),
		machineCommand(),
		// MicroVMs.
		runCommand(),
		psCommand(),
		rmCommand(),
		logsCommand(),
		consoleCommand(),
		execCommand(),
		sshCommand(),
		attachCommand(),
		vmCommand(),
		// What they are made of and reached by.
		imageCommand(),
		leaseCommand(),
		natCommand(),
		portCommand(),
		vpnCommand(),
		// The roles.
		hostCommand(),
		hubCommand(),
		containerdCommand(),
		ctrCommand(),
		dhcpLeaseListCommand(),
		labCommand(),
		versionCommand(),
	)
	return root
}

// environment is the name of the environment that a command is about.
func environment(cmd *cobra.Command) string {
	return cmp.Or(chosenEnvironment(cmd), usualEnvironment())
}

// checkEnvironment refuses what is no environment's name, docker's --env above all.
func checkEnvironment(cmd *cobra.Command) error {
	name := environment(cmd)
	if env.ValidName(name) {
		return nil
	}
	hint := ""
	if cmd.Flags().Lookup("env-var") != nil {
		hint = fmt.Sprintf("; a variable of the command is -e %s", name)
	}
	return fmt.Errorf("an environment cannot be called %q: only lower-case letters, digits and dashes, at most 32%s", name, hint)
}

// chosenEnvironment is the name that a flag gives, or none.
func chosenEnvironment(cmd *cobra.Command) string {
	if flag := cmd.Flag("name"); flag != nil && flag.Annotations[ofEnvironment] != nil && flag.Changed {
		return flag.Value.String()
	}
	if flag := cmd.Flag("env"); flag != nil {
		return flag.Value.String()
	}
	return ""
}

// usualEnvironment is the one that is meant where none is named.
func usualEnvironment() string { return cmp.Or(os.Getenv("INGOT_ENV"), env.DefaultName) }
