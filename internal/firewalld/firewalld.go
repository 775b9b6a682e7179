// Package firewalld tells a machine's firewalld, over D-Bus, what an Ingot on that
// machine needs of it, and tells it again whenever it has forgotten. It is the only
// package that speaks D-Bus. Nothing of firewalld's permanent configuration is ever
// written, and what is in there is its owner's: it is neither changed nor taken back.
package firewalld

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

// Wants are what firewalld is asked for.
type Wants struct {
	// Rules are direct ones, as `firewall-cmd --direct --get-all-rules` prints them.
	Rules []string
	// Trusted are interfaces whose packets firewalld is to let pass. Direct rules do
	// not: firewalld has its own chains drop what these have accepted.
	Trusted []string
	Sources []netip.Prefix // the same by source address
	Open    []Port
}

// Port is a UDP port of the machine's that an interface's neighbours may reach.
type Port struct {
	Interface string
	Number    uint16
}

// Without is what w has and others have not.
func (w Wants) Without(others Wants) Wants {
	return Wants{without(w.Rules, others.Rules), without(w.Trusted, others.Trusted), without(w.Sources, others.Sources), without(w.Open, others.Open)}
}

func without[T comparable](all, others []T) (left []T) {
	for _, x := range all {
		if !slices.Contains(others, x) {
			left = append(left, x)
		}
	}
	return left
}

// With is what w or others have.
func (w Wants) With(others Wants) Wants {
	more := others.Without(w)
	return Wants{
		slices.Concat(w.Rules, more.Rules), slices.Concat(w.Trusted, more.Trusted),
		slices.Concat(w.Sources, more.Sources), slices.Concat(w.Open, more.Open),
	}
}

// patience is how long firewalld may take for all that it is told at once. While it
// starts it answers nobody.
const patience = time.Minute

// Set gives firewalld what it has not got, and says whether there was any. Where no
// firewalld runs there is nothing to do.
func Set(ctx context.Context, w Wants) (changed bool, err error) {
	return set(ctx, w, nil)
}

// set is Set that calls note, if there is one, with each thing before firewalld is given it.
func set(ctx context.Context, w Wants, note func(Wants) error) (changed bool, err error) {
	err = w.each(ctx, func(ctx context.Context, i item) error {
		has, err := i.has(ctx)
		if err != nil || has {
			return err
		}
		if note != nil {
			if err := note(i.wanted); err != nil {
				return err
			}
		}
		changed = true
		return i.add(ctx)
	})
	return changed, err
}

// Withdraw takes back what Set has given, also if that was another process's.
func Withdraw(ctx context.Context, w Wants) error {
	return w.each(ctx, func(ctx context.Context, i item) error {
		has, err := i.has(ctx)
		if err != nil || !has {
			return err
		}
		// Ours is at run time only.
		kept, err := i.kept(ctx)
		if err != nil || kept {
			return err
		}
		return i.remove(ctx)
	})
}

// Missing names what firewalld has not got, with what gives it that.
func Missing(ctx context.Context, w Wants) (missing []string, err error) {
	err = w.each(ctx, func(ctx context.Context, i item) error {
		has, err := i.has(ctx)
		if err == nil && !has {
			missing = append(missing, i.String())
		}
		return err
	})
	return missing, err
}

// Running says whether a firewalld can be told something.
func Running(ctx context.Context) bool {
	b, err := open(ctx)
	if err != nil {
		return false
	}
	defer b.conn.Close()
	there, err := b.there(ctx)
	return err == nil && there
}

// each has f look at all that is wanted, if firewalld runs.
func (w Wants) each(ctx context.Context, f func(context.Context, item) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	b, err := open(ctx)
	if noBus(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reach firewalld: %w", err)
	}
	defer b.conn.Close()
	if there, err := b.there(ctx); err != nil || !there {
		return err
	}
	var problems []error
	for _, i := range w.items(b) {
		if err := f(ctx, i); err != nil && !alreadySo(err) {
			problems = append(problems, fmt.Errorf("%s: firewalld: %w", i, err))
		}
	}
	return errors.Join(problems...)
}

// Keep gives firewalld what is wanted now, when it starts, and when it has been
// reloaded, which makes it forget. Note, which may be nil, is called
// before with what it has not got already. Keep ends with ctx. On a machine that has no system bus it does nothing.
func Keep(ctx context.Context, w Wants, note func(Wants) error, log *slog.Logger) error {
	const first, last = time.Second, time.Minute
	for delay := first; ; delay = min(2*delay, last) {
		b, err := open(ctx)
		if noBus(err) && delay == first {
			<-ctx.Done()
			return nil
		}
		if err == nil {
			delay = first
			err = b.keep(ctx, w, note, log)
			b.conn.Close()
		}
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("lost sight of firewalld", "err", err, "again", delay)
		select { // The bus was there: it is being restarted.
		case <-time.After(delay):
		case <-ctx.Done():
			return nil
		}
	}
}

// keep follows one connection to the bus until that ends.
func (b bus) keep(ctx context.Context, w Wants, note func(Wants) error, log *slog.Logger) error {
	heard := make(chan *dbus.Signal, 16)
	b.conn.Signal(heard)
	for _, match := range [][]dbus.MatchOption{
		{dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, name)},
		{dbus.WithMatchInterface(name), dbus.WithMatchMember("Reloaded"), dbus.WithMatchObjectPath(runtime)},
	} {
		if err := b.conn.AddMatchSignalContext(ctx, match...); err != nil {
			return fmt.Errorf("listen to firewalld: %w", err)
		}
	}
	for {
		changed, err := set(ctx, w, note)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.Warn("firewalld does not let packets pass", "err", err)
		case changed:
			log.Info("told firewalld what to let pass", "interfaces", w.Trusted)
		}
		select {
		case <-heard:
		case <-b.conn.Context().Done():
			return errors.New("the system bus has ended")
		case <-ctx.Done():
			return nil
		}
	}
}

// noBus says whether an error means that there is no system bus here.
func noBus(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// alreadySo says whether firewalld has refused because somebody else was faster.
func alreadySo(err error) bool {
	var e dbus.Error
	if !errors.As(err, &e) {
		return false
	}
	code, _, _ := strings.Cut(e.Error(), ":")
	return code == "ALREADY_ENABLED" || code == "NOT_ENABLED" || code == "ZONE_ALREADY_SET" || code == "UNKNOWN_INTERFACE"
}
