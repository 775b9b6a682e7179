package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// usageError is a command line that makes no sense.
type usageError struct {
	command string // as it was called: ingot vm get
	cause   error
}

func (e *usageError) Error() string { return e.cause.Error() }

// misused is what a command returns for arguments that do not go together.
func misused(cmd *cobra.Command, format string, a ...any) error {
	return &usageError{cmd.CommandPath(), fmt.Errorf(format, a...)}
}

// execute runs root, and returns the command that it was. What cobra itself objects to, before a command begins, is
// a misuse.
func execute(ctx context.Context, root *cobra.Command) (*cobra.Command, error) {
	began := false
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	prepare(root, &began)
	cmd, err := root.ExecuteContextC(ctx)
	var misuse *usageError
	if err == nil || began || errors.As(err, &misuse) {
		return cmd, err
	}
	return cmd, &usageError{cmd.CommandPath(), err}
}

// prepare makes a group of commands (ingot vm) object to a word that it does not
// know, which cobra answers with help and success, and notes when a command begins.
func prepare(cmd *cobra.Command, began *bool) {
	for _, c := range cmd.Commands() {
		prepare(c, began)
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = group
	}
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			*began = true
			return run(cmd, args)
		}
	}
}

// group is what a command that is only a heading does.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	if cmd.SuggestionsMinimumDistance == 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	hint := ""
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(like, ", "))
	}
	return misused(cmd, "%s has no command %q%s", cmd.CommandPath(), args[0], hint)
}
