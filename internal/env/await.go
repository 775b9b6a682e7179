package env

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"ingot/internal/run"
)

const (
	// answerTime is how long the hub and hosts may take until they answer, and
	// standTime how long if a process stands still: that is no lack of time.
	answerTime = time.Minute
	standTime  = 10 * time.Second
	// quietTime is how long one waits without being told for what.
	quietTime = 2 * time.Second
)

// answers waits until a machine's service answers, and says after a while for which
// processes it waits.
func (u *up) answers(ctx context.Context, machine string, ask func(context.Context) error) error {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	start, said := time.Now(), false
	return await(ctx, machine+" does not answer, see `ingot machine logs "+machine+"`", func(ctx context.Context) error {
		if !said {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, quietTime)
			defer cancel()
		}
		err := ask(ctx)
		if err == nil || time.Since(start) < quietTime {
			return err
		}
		list, stand := u.processes(machine)
		if !said {
			said = true
			u.say("  wait for %s: %s", machine, list)
		}
		if stand && time.Since(start) > standTime {
			giveUp(errors.New(list))
		}
		return fmt.Errorf("%s: %w", list, err)
	})
}

// processes names a machine's roles, and says whether one of them stands still.
func (u *up) processes(machine string) (list string, stand bool) {
	var all []string
	for _, s := range u.lab.States() {
		for _, r := range s.Roles {
			if s.Name != machine {
				continue
			}
			how := fmt.Sprintf("process %d", r.PID)
			switch {
			case !r.Running:
				how = "it does not run"
			case run.Stopped(r.PID):
				how += fmt.Sprintf(", which stands still: kill -CONT %d", r.PID)
				stand = true
			}
			all = append(all, fmt.Sprintf("%s (%s)", r.Name, how))
		}
	}
	return strings.Join(all, ", "), stand
}

// await asks again and again until the answer is good. If it never is, wrong says
// what that means.
func await(ctx context.Context, wrong string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := ask(try)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
				err = cause
			}
			return fmt.Errorf("%s: %w", wrong, err)
		case <-time.After(wait):
		}
	}
}
