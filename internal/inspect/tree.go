package inspect

import (
	"context"
	"sync"
	"time"
)

// step is a check that is to be made.
type step struct {
	name     string
	check    func(context.Context) finding // nil: a heading
	children []step                        // made together, unless check failed
	more     func() []step                 // children that only check could know of
	mild     bool                          // what fails is only a warning
}

// finding is what a check found.
type finding struct {
	status  Status
	detail  string
	notes   []string
	bar     string // not empty: why the children need not be made, though this passed
	lasting bool
}

func pass(detail string, notes ...string) finding {
	return finding{status: Pass, detail: detail, notes: notes}
}

func fail(detail string) finding { return finding{status: Fail, detail: detail} }

func warn(detail string) finding { return finding{status: Warn, detail: detail} }

func skip(why string) finding { return finding{status: Skip, detail: why} }

// all makes the checks of steps at the same time, and answers in their order.
func all(ctx context.Context, steps []step) []Check {
	checks := make([]Check, len(steps))
	var wg sync.WaitGroup
	for i, s := range steps {
		wg.Go(func() { checks[i] = s.make(ctx) })
	}
	wg.Wait()
	return checks
}

func (s step) make(ctx context.Context) Check {
	start := time.Now()
	found := pass("")
	if s.check != nil {
		found = s.check(ctx)
	}
	c := Check{Name: s.name, Status: found.status, Detail: found.detail, Notes: found.notes, Lasting: found.lasting}
	switch {
	case found.status == Fail:
		c.Children = skipped(s.children, s.name+" failed")
	case found.status == Skip:
		c.Children = skipped(s.children, found.detail)
	case found.bar != "":
		c.Children = skipped(s.children, found.bar)
	default:
		steps := s.children
		if s.more != nil {
			steps = append(steps[:len(steps):len(steps)], s.more()...)
		}
		c.Children = all(ctx, steps)
		c.Status = worse(c.Status, worst(c.Children))
	}
	c.Took = Seconds(time.Since(start).Seconds())
	if s.mild {
		return milder(c)
	}
	return c
}

// milder is a check and all below it, with warnings where they failed.
func milder(c Check) Check {
	if c.Status == Fail {
		c.Status = Warn
	}
	for i := range c.Children {
		c.Children[i] = milder(c.Children[i])
	}
	return c
}

// skipped are the checks of steps that are not made.
func skipped(steps []step, why string) []Check {
	checks := make([]Check, len(steps))
	for i, s := range steps {
		checks[i] = Check{Name: s.name, Status: Skip, Detail: why, Children: skipped(s.children, why)}
	}
	return checks
}

// worst is a heading's status: a skip below is no reason to look twice.
func worst(checks []Check) Status {
	status := Pass
	for _, c := range checks {
		status = worse(status, c.Status)
	}
	return status
}

func worse(a, b Status) Status {
	rank := map[Status]int{Warn: 1, Fail: 2}
	if rank[b] > rank[a] {
		return b
	}
	return a
}
