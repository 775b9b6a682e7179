package main

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"ingot/internal/inspect"
)

func inspectCommand() *cobra.Command {
	var out *output
	var verbose bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "inspect",
		Short: "Check the hub, the hosts and each microVM",
		Long: `Check the hub, the hosts and each microVM, and say exactly what is wrong.

The exit code is 0 unless a check fails. With -v each check shows the
configuration that it looked at, and the file, unit and port it lives in.`,
		Args: cobra.NoArgs,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			if wait < 0 {
				return misused(cmd, "--wait %s: it must not be negative", wait)
			}
			return nil
		},
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			r := c.inspect(cmd.Context(), wait)
			style := inspect.Style{Notes: verbose, Colour: isTerminal(os.Stdout) && os.Getenv("NO_COLOR") == ""}
			if err := out.write(hints{cmd.OutOrStdout(), c.name}, r, func(w io.Writer) error { return r.Text(w, style) }); err != nil {
				return err
			}
			if !r.OK {
				return exitCode(1)
			}
			return nil
		}),
	}
	out = outputFlag(cmd)
	f := cmd.Flags()
	f.BoolVarP(&verbose, "verbose", "v", false, "with the configuration")
	f.DurationVar(&wait, "wait", 0, "check again until nothing fails, at most so long: 60s")
	return cmd
}

// inspect makes the checks once, or until nothing fails.
func (c *cloud) inspect(ctx context.Context, wait time.Duration) inspect.Report {
	if wait <= 0 {
		return inspect.Run(ctx, c.inspection)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	p := newProgress()
	defer p.clear()
	return inspect.Wait(ctx, c.inspection, func(r inspect.Report) {
		if found := r.Findings(); len(found) > 0 && !r.OK {
			p.say("not green: "+pasteable(found[0], c.name), "")
		}
	})
}
