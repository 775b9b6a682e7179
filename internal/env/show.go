package env

import (
	"context"
	"fmt"
	"slices"
)

// showPlan says what will change, and nothing of what is as it should be.
func (u *up) showPlan(ctx context.Context) (string, error) {
	lines := changes(u.was, u.env)
	lines = append(lines, u.roleChanges(ctx)...)
	lines = append(lines, u.vmPlan().lines()...)
	lines = append(lines, u.showAccess(ctx)...)
	if u.firstVMs() {
		for _, m := range u.first() {
			lines = append(lines, fmt.Sprintf("+ microVM %s on %s", m, m.Host))
		}
	}
	for _, line := range lines {
		fmt.Fprintln(u.Plan, line)
	}
	switch {
	case len(lines) > 0 && u.DryRun:
		return "a dry run: nothing was changed", nil
	case len(lines) > 0:
		return fmt.Sprintf("%d changes", len(lines)), nil
	case u.DryRun:
		fmt.Fprintln(u.Plan, "nothing to change")
	}
	return "nothing to change", nil
}

// roleChanges are about machines that were there and stay.
func (u *up) roleChanges(ctx context.Context) []string {
	if u.was == nil {
		return nil
	}
	var lines []string
	say := func(format string, a ...any) { lines = append(lines, fmt.Sprintf(format, a...)) }
	u.token, _ = u.was.Token()
	for _, m := range u.env.Machines {
		s, known := u.states[m.Name]
		if known && !s.Up {
			say("~ machine %s: it is down: start it, with its roles and microVMs", m.Name)
		}
		if !known || !s.Up {
			continue
		}
		stale := map[string]bool{}
		files, _ := u.files(ctx, m)
		for _, f := range files {
			stale[f.path] = !u.lab.HasFile(m.Name, f.path, f.text)
		}
		for _, r := range s.Roles {
			reads := u.reads(m.Name, r.Name)
			switch {
			case !r.Running:
				say("~ role %s on %s: it does not run: start it", r.Name, m.Name)
			case slices.ContainsFunc(reads, func(path string) bool { return stale[path] }):
				say("~ role %s on %s: restart it with another configuration; its microVMs run on", r.Name, m.Name)
			case r.Stale:
				say("~ role %s on %s: restart it, another program or another certificate; its microVMs run on", r.Name, m.Name)
			}
		}
	}
	return lines
}

// reads are the files that a role reads when it starts.
func (u *up) reads(machine, role string) []string {
	for _, m := range u.lab.Machines {
		for _, r := range m.Roles {
			if m.Name == machine && r.Name == role {
				return r.Files
			}
		}
	}
	return nil
}
