package env

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/internal/inspect"
	"ingot/internal/lab"
	"ingot/internal/pki"
)

// Options of Up.
type Options struct {
	Declared *Declaration // what a file says; nil: what is there, or the usual
	Out      io.Writer    // progress, a line a step
	Plan     io.Writer    // what will change; nil: Out
	DryRun   bool         // end with the plan
	Force    bool         // do also what loses microVMs' disks
	Binary   string       // ingot; empty: this one
	Wait     time.Duration
	NoVMs    bool // don't make the first microVMs
}

// up is one run of Up.
type up struct {
	Options
	name string

	// Facts.
	missing Objections // what this machine lacks
	blind   bool       // and therefore nothing of what follows is known
	was     *Env       // nil: there is none yet
	others  []Env
	states  map[string]lab.State // by machine
	have    []placed             // microVMs

	env     Env
	lab     *lab.Lab
	token   pki.Secret
	authKey pki.Secret // of the tailnet; empty: the hub has one, or needs none
	conns   Conns
	choice  *lab.FileLock // while the network is being chosen

	stamp    []byte // of the images that this program makes
	building *building
	saying   sync.Mutex // guards Out
}

// Up brings an environment up, completes one, or makes it what its file says, and
// returns when all of it is green. What is as it should be is left alone.
func Up(ctx context.Context, name string, o Options) (Env, error) {
	u := &up{Options: o, name: name}
	if err := u.prepare(ctx); err != nil {
		return Env{}, err
	}
	if !o.DryRun && u.missing == nil {
		lock, err := lockEnvironment(ctx, name, o.Out)
		if err != nil {
			return Env{}, err
		}
		defer lock.Release()
	}
	defer u.close()
	for _, step := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"facts", u.gatherFacts},
		{"check", u.check}, // nothing is changed before it has passed
		{"plan", u.showPlan},
		// Here a dry run ends. Install:
		{"environment", u.keep},
		{"building", u.buildImages}, // goes on beside what follows, until images
		{"certificates", u.makeCertificates},
		{"machines", u.makeMachines},
		{"configuration", u.configure},
		{"roles", u.startRoles},
		// Then, from the bottom up:
		{"hub", u.awaitHub},
		{"images", u.provideImages},
		{"hosts", u.awaitHosts},
		{"microVMs", u.startMicroVMs},
		{"access", u.giveAccess},
		{"inspect", u.awaitGreen},
	} {
		start := time.Now()
		detail, err := step.do(ctx)
		if err != nil {
			return u.env, u.failed(ctx, step.name, err)
		}
		u.say("%-14s %-50s %5.1f s", step.name, detail, time.Since(start).Seconds())
		if step.name == "plan" && o.DryRun {
			return u.env, nil
		}
	}
	return u.env, nil
}

// failed says in which step it was. Objections say themselves what they are about,
// and what an interrupt made of a step is of no interest.
func (u *up) failed(ctx context.Context, step string, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	var all Objections
	if errors.As(err, &all) {
		return err
	}
	return fmt.Errorf("bring %s up: %s: %w", u.name, step, err)
}

// say writes a line of progress. What is built beside the steps speaks, too.
func (u *up) say(format string, a ...any) {
	u.saying.Lock()
	defer u.saying.Unlock()
	fmt.Fprintf(u.Out, format+"\n", a...)
}

func (u *up) close() {
	u.building.end()
	u.conns.Close()
	if u.choice != nil {
		u.choice.Release()
	}
}

func (u *up) awaitGreen(ctx context.Context) (string, error) {
	wait := u.Wait
	if wait == 0 {
		wait = 3 * time.Minute // a guest without KVM takes its time
	}
	start := time.Now()
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	i := u.env.Inspection(u.conns)
	i.Awaited = u.ours
	r := inspect.Wait(waiting, i, func(r inspect.Report) {
		if r.Stuck() {
			cancel()
		}
	})
	if !r.OK {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("not green after %s: %v (`ingot doctor` may say why): %w",
			time.Since(start).Round(time.Second), r.Findings(), errdefs.ErrUnavailable)
	}
	if n := len(r.Findings()); n > 0 {
		return fmt.Sprintf("green, with %d warnings: see `ingot inspect`", n), nil
	}
	return "all green", nil
}

// ours says whether a microVM is one that `up` makes: it does not wait for what
// people have made by hand.
func (u *up) ours(name string) bool {
	is := func(m MicroVM) bool { return m.String() == name }
	return slices.ContainsFunc(u.env.MicroVMs, is) || slices.ContainsFunc(u.first(), is)
}
