package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
	"ingot/internal/env"
)

func doctorCommand() *cobra.Command {
	var out *output
	var fix, yes bool
	cmd := &cobra.Command{
		Use:   "doctor [CHECK...]",
		Short: "Look at this machine for what `ingot up` and its microVMs need, and mend it",
		Long: `Look at this machine for what ` + "`ingot up`" + ` and its microVMs need: each thing that is
wrong, what that breaks, and what mends it. With --fix it is mended, each after a
question. With CHECKs only these are made.

The exit code is 0 unless something stops ` + "`ingot up`" + `.`,
		ValidArgs: checkNames(),
		RunE: func(cmd *cobra.Command, args []string) error {
			checks, err := chosenChecks(args)
			switch {
			case err != nil:
				return misused(cmd, "%w", err)
			case yes && !fix:
				return misused(cmd, "--yes agrees to what --fix asks")
			case fix && !yes && !isTerminal(os.Stdin):
				return misused(cmd, "--fix asks before it changes anything, and standard input is no terminal: --yes agrees to all, and nothing was changed")
			}
			p, err := env.Patient(environment(cmd))
			if err != nil {
				return err
			}
			r := doctor.Look(cmd.Context(), p, checks)
			if fix {
				m := mender{in: bufio.NewReader(os.Stdin), out: hints{cmd.ErrOrStderr(), environment(cmd)}, yes: yes}
				did, err := m.mend(cmd.Context(), r)
				if err != nil {
					return err
				}
				if did {
					if p, err = env.Patient(environment(cmd)); err != nil {
						return err
					}
					r = doctor.Look(cmd.Context(), p, checks)
				}
			}
			if err := out.write(hints{cmd.OutOrStdout(), environment(cmd)}, r, r.Text); err != nil {
				return err
			}
			if !r.OK {
				return exitCode(1)
			}
			return nil
		},
	}
	out = outputFlag(cmd)
	f := cmd.Flags()
	f.BoolVar(&fix, "fix", false, "mend what can be mended, after a question each")
	f.BoolVar(&yes, "yes", false, "with --fix: don't ask")
	return cmd
}

func checkNames() []string {
	var names []string
	for _, c := range doctor.Checks() {
		names = append(names, c.Name)
	}
	return names
}

// chosenChecks are those of some names, or all.
func chosenChecks(names []string) ([]doctor.Check, error) {
	if len(names) == 0 {
		return doctor.Checks(), nil
	}
	for _, name := range names {
		if !slices.Contains(checkNames(), name) {
			return nil, fmt.Errorf("there is no check %q, only %s", name, strings.Join(checkNames(), ", "))
		}
	}
	return slices.DeleteFunc(doctor.Checks(), func(c doctor.Check) bool { return !slices.Contains(names, c.Name) }), nil
}

// mender mends what a person agrees to.
type mender struct {
	in  *bufio.Reader
	out hints
	yes bool
}

// mend goes through what is wrong, and says whether it has tried to change anything.
// What could not be mended is said, and the rest is tried nevertheless.
func (m mender) mend(ctx context.Context, r doctor.Report) (did bool, err error) {
	for _, f := range r.Checks {
		if !f.Wrong() || !f.Fixable {
			continue
		}
		agreed, err := m.ask(ctx, f)
		if err != nil {
			return did, err
		}
		if !agreed {
			continue
		}
		did = true
		if err := f.Mend(ctx); err != nil {
			if ctx.Err() != nil {
				return did, ctx.Err()
			}
			fmt.Fprintf(m.out, "%s: not mended: %s\n", f.Name, explain(err, m.out.name))
			continue
		}
		fmt.Fprintf(m.out, "%s: done: %s\n", f.Name, f.Fix)
	}
	return did, nil
}

func (m mender) ask(ctx context.Context, f doctor.Finding) (bool, error) {
	if m.yes {
		return true, nil
	}
	fmt.Fprintf(m.out, "%s: %s\n  %s\nDo this? [y/N] ", f.Name, f.Detail, f.Fix)
	if m.in.Buffered() == 0 {
		if err := awaitInput(ctx, os.Stdin); err != nil {
			fmt.Fprintln(m.out)
			return false, err
		}
	}
	line, err := m.in.ReadString('\n')
	if err != nil && err != io.EOF {
		return false, err
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", nil
}

// awaitInput waits until f can be read, or ctx ends: a read itself can't be
// interrupted.
func awaitInput(ctx context.Context, f *os.File) error {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	for ctx.Err() == nil {
		if n, err := unix.Poll(fds, 100); n > 0 || err != nil && err != unix.EINTR {
			return err
		}
	}
	return ctx.Err()
}
