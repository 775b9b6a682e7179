package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
)

func execCommand() *cobra.Command {
	var stdin, tty bool
	var env []string
	var dir, user string
	cmd := &cobra.Command{
		Use:   "exec NAME -- COMMAND…",
		Short: "Run a command in a microVM",
		Long: "Run a command in a microVM by its agent, without a network. Its exit code becomes that of ingot. " + naming + `

With a terminal at both ends, -it is as if given.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := commandAfter(cmd, args)
			if err != nil {
				return err
			}
			if len(command) == 0 {
				return misused(cmd, "there is no command: %s exec %s -- sh", program(environment(cmd)), args[0])
			}
			vars, err := variables(cmd, env)
			if err != nil {
				return err
			}
			if person := isTerminal(os.Stdin) && isTerminal(os.Stdout); person && !cmd.Flags().Changed("stdin") && !cmd.Flags().Changed("tty") {
				stdin, tty = true, true
			}
			if err := checkTerminal(cmd, stdin, tty); err != nil {
				return err
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if err := booted(cmd.Context(), vm); err != nil {
					return err
				}
				return attach(cmd.Context(), vm, &ingotv1.ExecStart{
					Uid: vm.uid(), Args: command, Env: vars, WorkingDir: dir, User: user, Tty: tty, Stdin: stdin,
				})
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&stdin, "stdin", "i", false, "pass standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&env, "env-var", "e", nil, "set a variable: KEY=VALUE")
	f.StringVarP(&dir, "workdir", "w", "", "directory in the guest")
	f.StringVarP(&user, "user", "u", "", "user in the guest: name or id, and :group")
	f.SetInterspersed(false)
	return cmd
}

// bootPatience is how long a guest's agent is waited for, after its start if that has been.
const bootPatience = 2 * time.Minute

// booted waits for the agent of a microVM that was just started, and says so if it takes a
// moment. It returns without it too: the call that needs the agent then says what is wrong.
func booted(ctx context.Context, vm microVM) error {
	boots := func(vm microVM) bool {
		switch st := vm.GetStatus(); state(st) {
		case "pending", "starting":
			return true
		case "running":
			return !st.GetAgentReady() && time.Since(st.GetStartedAt().AsTime()) < bootPatience
		}
		return false
	}
	if !boots(vm) {
		return nil
	}
	notice := time.AfterFunc(silence, func() { fmt.Fprintf(os.Stderr, "ingot: %s boots: waiting for its agent\n", vm) })
	defer notice.Stop()
	patience, cancel := context.WithTimeout(ctx, bootPatience)
	defer cancel()
	_, err := observe(patience, vm, func() {}, func(vm microVM) (bool, error) { return !boots(vm), nil })
	if err != nil && ctx.Err() == nil && patience.Err() != nil {
		return nil
	}
	return err
}

// checkTerminal refuses a terminal in the guest whose input is none here: the end
// of a file can't be told to it.
func checkTerminal(cmd *cobra.Command, stdin, tty bool) error {
	if stdin && tty && !isTerminal(os.Stdin) {
		return misused(cmd, "-t: standard input is no terminal; leave -t out")
	}
	return nil
}

// commandAfter parses the flags between a command's first argument and the
// command line that follows it, with or without -- before that, and returns the
// latter. The command's own flags must not be interspersed.
func commandAfter(cmd *cobra.Command, args []string) ([]string, error) {
	if err := cmd.Flags().Parse(args[1:]); err != nil {
		return nil, misused(cmd, "%w", err)
	}
	if err := checkEnvironment(cmd); err != nil {
		return nil, misused(cmd, "%w", err)
	}
	return cmd.Flags().Args(), nil
}

// variables are those of -e KEY=VALUE; -e KEY takes the value that it has here.
func variables(cmd *cobra.Command, given []string) (map[string]string, error) {
	vars := map[string]string{}
	for _, pair := range given {
		key, value, ok := strings.Cut(pair, "=")
		if key == "" {
			return nil, misused(cmd, "-e %s: it must be KEY=VALUE", pair)
		}
		if !ok {
			value = os.Getenv(key)
		}
		vars[key] = value
	}
	return vars, nil
}
