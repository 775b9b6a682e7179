package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
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
	Name     string     `json:"name"`
	Running  bool       `json:"running"`
	PID      int        `json:"pid"`
	Since    *time.Time `json:"since"`
	Restarts int        `json:"restarts"`
	Log      string     `json:"log"`
}

func newRoleView(r lab.RoleState) roleView {
	v := roleView{Name: r.Name, Running: r.Running, PID: r.PID, Restarts: r.Restarts, Log: r.Log}
	if !r.Since.IsZero() { // it was never started
		v.Since = new(r.Since.UTC())
	}
	return v
}

func openLab(cmd *cobra.Command, open func(string) (env.Env, error)) (*lab.Lab, error) {
	e, err := open(environment(cmd))
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
			l, err := openLab(cmd, env.Open)
			if err != nil {
				return err
			}
			views := []machineView{}
			var rows [][]string
			for _, s := range l.States() {
				v := machineView{Name: s.Name, Address: s.Address.String(), Up: s.Up, Roles: []roleView{}}
				for _, r := range s.Roles {
					v.Roles = append(v.Roles, newRoleView(r))
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
		Use: "exec MACHINE -- COMMAND…", Short: "Run a command in a machine", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := commandAfter(cmd, args)
			if err != nil {
				return err
			}
			if len(command) == 0 {
				return misused(cmd, "there is no command: %s machine exec %s -- ip a", program(environment(cmd)), args[0])
			}
			return inMachine(cmd, args[0], command...)
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func inMachine(cmd *cobra.Command, name string, argv ...string) error {
	l, err := openLab(cmd, env.OpenUp)
	if err != nil {
		return err
	}
	if _, err := findMachine(l, name); err != nil {
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

func findMachine(l *lab.Lab, name string) (lab.Machine, error) {
	var names []string
	for _, m := range l.Machines {
		if m.Name == name {
			return m, nil
		}
		names = append(names, m.Name)
	}
	return lab.Machine{}, fmt.Errorf("find machine %s: %w: environment %s has %s", name, errdefs.ErrNotFound, l.Name, strings.Join(names, ", "))
}

// rolesOf are a machine's roles, or the one of that name.
func rolesOf(m lab.Machine, name string) ([]lab.Role, error) {
	var names []string
	for _, r := range m.Roles {
		if r.Name == name {
			return []lab.Role{r}, nil
		}
		names = append(names, r.Name)
	}
	if name != "" {
		return nil, fmt.Errorf("find role %s: %w: %s has %s", name, errdefs.ErrNotFound, m.Name, strings.Join(names, ", "))
	}
	return m.Roles, nil
}

func machineLogsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use: "logs MACHINE [ROLE]", Short: "Show what a machine's roles have logged", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := openLab(cmd, env.Open)
			if err != nil {
				return err
			}
			m, err := findMachine(l, args[0])
			if err != nil {
				return err
			}
			roles, err := rolesOf(m, strings.Join(args[1:], ""))
			if err != nil {
				return err
			}
			for i, r := range roles {
				last := i == len(roles)-1
				if err := logfile.Follow(cmd.Context(), l.LogPath(m.Name, r.Name), 0, follow && last, cmd.OutOrStdout()); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted (of several roles, the last)")
	return cmd
}
