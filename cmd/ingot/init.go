package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"ingot/docs"
)

// initCommand writes a file for `ingot up -f`: the reference, which says all that
// can be said.
func initCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a file that describes an environment, for `ingot up -f`",
		Long: `Write a file that describes an environment, with what each key means: to
environment.yaml, or to FILE; - is standard output.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			file := "environment.yaml"
			if len(args) > 0 {
				file = args[0]
			}
			if file == "-" {
				_, err := cmd.OutOrStdout().Write(docs.Environment)
				return err
			}
			how := os.O_CREATE | os.O_WRONLY | os.O_EXCL
			if force {
				how = os.O_CREATE | os.O_WRONLY | os.O_TRUNC
			}
			f, err := os.OpenFile(file, how, 0o644)
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("write %s: it is there already; --force overwrites it", file)
			}
			if err != nil {
				return fmt.Errorf("write environment: %w", err)
			}
			_, err = f.Write(docs.Environment)
			if err := errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("write environment: %w", err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "%s written. Next: ingot up -f %s --dry-run\n", file, file)
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a file that is there")
	return cmd
}
