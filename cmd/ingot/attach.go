package main

import (
	"os"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
)

func attachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "attach NAME",
		Short: "Attach to a microVM's process that waits for it",
		Long: `Attach to a microVM's process that waits for it: that of a microVM made by run -i or -t
and started again. Its exit code becomes that of ingot, and its end is the microVM's. ` + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			vm, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return attach(cmd.Context(), vm, &ingotv1.ExecStart{
				Uid: vm.uid(), Main: true, Env: map[string]string{}, Stdin: true,
				Tty: isTerminal(os.Stdin) && isTerminal(os.Stdout),
			})
		}),
	}
}
