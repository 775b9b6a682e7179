// Command ingot turns Linux machines into a microVM cloud: it brings an
// environment up and inspects it, is every role of it (network hub, microVM
// host, containerd), and talks to it. It also answers to the names flintlockd,
// ctr, dhcp-lease-list and dhcp-leases-list.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	os.Exit(Main())
}

// Main runs the command line and returns the exit code: 0 done, 1 not done,
// 2 misused; a command that runs another's (exec, run -it) returns that one's.
func Main() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := rootCommand()
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	fmt.Fprintln(os.Stderr, "ingot:", err)
	return 1
}

// exitCode is the error of a command that has said all there is to say, and
// only wants its exit code.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "ingot",
		Short:         "A microVM cloud from ordinary Linux machines",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(
		containerdCommand(),
		ctrCommand(),
	)
	return root
}
