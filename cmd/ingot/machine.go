package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"ingot/internal/env"
	"ingot/internal/lab"
	"ingot/internal/logfile"
)

// machineCommand enters the environment's machines.
func machineCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "machine", Short: "List the environment's machines and enter them"}
	cmd.AddCommand(machineListCommand(), machineShellCommand(), machineExecCommand(), machineLogsCommand())
	return cmd
}

// machineView is a machine as -o json shows it. docs/json.md describes it.
type machineView struct {
	Name    string     `json:"name"`
	Address string     `json:"address"`
	Up      bool       `json:"up"`
	Roles   []roleView `json:"roles"`
}

type roleView struct {
	Name     string    `json:"name"`
	Running  bool      `json:"running"`
	PID      int       `json:"pid"`
	Since    time.Time `json:"since"`
	Restarts int       `json:"restarts"`
	Log      string    `json:"log"`
}

func openLab(cmd *cobra.Command) (*lab.Lab, error) {
	e, err := env.Open(environment(cmd))
	if err != nil {
		return nil, err
	}
	binary, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return e.Lab(binary), nil
}

func machineListCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List machines and what runs on them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := openLab(cmd)
			if err != nil {
				return err
			}
			views := []machineView{}
			var rows [][]string
			for _, s := range l.States() {
				v := machineView{Name: s.Name, Address: s.Address.String(), Up: s.Up, Roles: []roleView{}}
				for _, r := range s.Roles {
					v.Roles = append(v.Roles, roleView{r.Name, r.Running, r.PID, r.Since.UTC(), r.Restarts, r.Log})
					state, age := "dead", ""
					if r.Running {
						state, age = "running", time.Since(r.Since).Round(time.Second).String()
					}
					rows = append(rows, []string{s.Name, s.Address.String(), r.Name, state, fmt.Sprint(r.PID), age, fmt.Sprint(r.Restarts)})
				}
				views = append(views, v)
			}
			return out.write(cmd.OutOrStdout(), views, func(w io.Writer) error {
				return table(w, "MACHINE ADDRESS ROLE STATE PID AGE RESTARTS", rows)
			})
		},
	}
	out = outputFlag(cmd)
	return cmd
}

func machineShellCommand() *cobra.Command {
	return &cobra.Command{
		Use: "shell MACHINE", Short: "Open a shell in a machine", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			shell := os.Getenv("SHELL")
			if shell == "" {
				shell = "/bin/sh"
			}
			return inMachine(cmd, args[0], shell)
		},
	}
}

func machineExecCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec MACHINE -- COMMAND…", Short: "Run a command in a machine", Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error { return inMachine(cmd, args[0], args[1:]...) },
	}
	return cmd
}

func inMachine(cmd *cobra.Command, name string, argv ...string) error {
	l, err := openLab(cmd)
	if err != nil {
		return err
	}
	if err := hasMachine(l, name); err != nil {
		return err
	}
	// Ctrl-C is for the command: it gets it from the terminal.
	c := l.Command(context.WithoutCancel(cmd.Context()), name, argv...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	// The names that people type on a host (ctr, dhcp-lease-list) are beside ours.
	c.Env = append(os.Environ(), "PATH="+filepath.Dir(l.Binary)+":"+os.Getenv("PATH"))
	err = c.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitCode(128 + int(status.Signal())) // as a shell has it
	}
	return exitCode(exit.ExitCode())
}

func hasMachine(l *lab.Lab, name string) error {
	var names []string
	for _, m := range l.Machines {
		names = append(names, m.Name)
	}
	if !slices.Contains(names, name) {
		return fmt.Errorf("find machine %s: %w: environment %s has %s", name, errdefs.ErrNotFound, l.Name, strings.Join(names, ", "))
	}
	return nil
}

func machineLogsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use: "logs MACHINE [ROLE]", Short: "Show what a machine's roles have logged", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := openLab(cmd)
			if err != nil {
				return err
			}
			if err := hasMachine(l, args[0]); err != nil {
				return err
			}
			for _, m := range l.Machines {
				if m.Name != args[0] {
					continue
				}
				for i, r := range m.Roles {
					if len(args) == 2 && args[1] != r.Name {
						continue
					}
					last := len(args) == 2 || i == len(m.Roles)-1
					if err := logfile.Follow(cmd.Context(), l.LogPath(m.Name, r.Name), 0, follow && last, cmd.OutOrStdout()); err != nil {
						return err
					}
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted (of several roles, the last)")
	return cmd
}
