package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"

	"ingot/internal/lab"
	"ingot/internal/logline"
)

// labCommand holds what a lab runs itself as. None is for people.
func labCommand() *cobra.Command {
	c := &cobra.Command{Use: "lab", Short: "Parts of a lab", Hidden: true}
	c.AddCommand(
		&cobra.Command{
			Use: "hold", Short: "Be a new machine's first process", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return lab.Hold(os.Stdin, os.Stdout) },
		},
		&cobra.Command{
			Use: "enter PIN -- COMMAND…", Short: "Run a command in a machine", Args: cobra.MinimumNArgs(2),
			RunE: func(_ *cobra.Command, args []string) error {
				err := lab.Enter(args[0], args[1:])
				if errors.Is(err, exec.ErrNotFound) {
					fmt.Fprintln(os.Stderr, "ingot:", err)
					return exitCode(127) // as a shell has it
				}
				if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ENOEXEC) {
					fmt.Fprintln(os.Stderr, "ingot:", err)
					return exitCode(126)
				}
				return err
			},
		},
		&cobra.Command{
			Use: "write", Short: "Write a machine's files, from inside", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return lab.Write(os.Stdin) },
		},
		&cobra.Command{
			Use: "supervise RUNDIR", Short: "Keep a lab's roles running", Args: cobra.ExactArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				return lab.Supervise(c.Context(), args[0], os.Stdin, logline.New(os.Stderr, logline.Text, slog.LevelInfo))
			},
		},
	)
	return c
}
