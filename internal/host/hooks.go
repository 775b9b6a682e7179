package host

import (
	"time"

	"ingot/internal/vmm"
)

// Work is what a host does for a microVM.
type Work string

// The kinds of work.
const (
	Creating Work = "create" // until its hypervisor runs for the first time, by the daemon that was asked to
	Starting Work = "start"  // every other start
	Stopping Work = "stop"
	Deleting Work = "delete"
)

// Hooks are told what happens, as it happens, on the goroutines that do it: they
// return at once. One that is nil is told nothing.
type Hooks struct {
	// Took is told how long a step of the work has taken, or all of it if step is
	// empty: from when it was asked for, tries that failed and all.
	Took func(w Work, step string, took time.Duration)
	// Failed is told why a try has failed, and in which step; there may be none.
	Failed func(w Work, step string, err error)
	// Ended is told of a guest's end, and whether it starts again for that.
	Ended func(cause vmm.Cause, again bool)
}

func (h Hooks) filled() Hooks {
	if h.Took == nil {
		h.Took = func(Work, string, time.Duration) {}
	}
	if h.Failed == nil {
		h.Failed = func(Work, string, error) {}
	}
	if h.Ended == nil {
		h.Ended = func(vmm.Cause, bool) {}
	}
	return h
}

// recorded tells of the first step of a create, which is done while the client waits.
func (h Hooks) recorded(asked time.Time, err error) {
	if err != nil {
		h.Failed(Creating, "record", err)
		return
	}
	h.Took(Creating, "record", time.Since(asked))
}

// course is the work that a microVM's goroutine is at.
type course struct {
	hooks Hooks
	asked time.Time // for the microVM, of this daemon; zero once it has run
	work  Work
	step  string
	since time.Time
}

// begin begins work, which has no step yet.
func (c *course) begin(w Work) { c.work, c.step = w, "" }

// boot begins to create or to start.
func (c *course) boot() {
	c.begin(Starting)
	if !c.asked.IsZero() {
		c.work = Creating
	}
}

// leave begins work after which the microVM has not been created any more.
func (c *course) leave(w Work) {
	c.begin(w)
	c.asked = time.Time{}
}

// next ends a step, if there is one, and begins another.
func (c *course) next(step string) {
	c.done()
	c.step, c.since = step, time.Now()
}

// done ends the step.
func (c *course) done() {
	if c.step != "" {
		c.hooks.Took(c.work, c.step, time.Since(c.since))
	}
	c.step = ""
}

// runs ends the last step of a boot.
func (c *course) runs() {
	c.done()
	if c.work == Creating {
		c.hooks.Took(Creating, "", time.Since(c.asked))
		c.asked = time.Time{}
	}
}

// booted tells how long the guest's part of a boot has taken, if we have seen it.
func (c *course) booted(took time.Duration) {
	if c.work == Creating || c.work == Starting {
		c.hooks.Took(c.work, "guest", took)
	}
}

// deleted ends the last step of a delete, and with it the work.
func (c *course) deleted(asked time.Time) {
	c.done()
	if !asked.IsZero() { // an older daemon did not note it
		c.hooks.Took(Deleting, "", time.Since(asked))
	}
}

func (c *course) failed(err error) {
	c.hooks.Failed(c.work, c.step, err)
	c.step = ""
}
