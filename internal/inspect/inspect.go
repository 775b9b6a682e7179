// Package inspect says how an environment is: a tree of checks of its network
// hub, its hosts and their microVMs, made by asking their services over gRPC.
// A check that failed spares those below it, which are skipped and say why; all
// others run at the same time. It owns nothing, repairs nothing and reads no
// file: the connections are given to it.
package inspect

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/grpc"
)

// Machine is a machine of the environment, and the connection to its service.
type Machine struct {
	Name     string     // network-hub, host-0
	Address  netip.Addr // on the segment; the zero value is not checked
	Endpoint string     // where the connection leads, for messages
	Conn     grpc.ClientConnInterface
}

// Environment is what is to be inspected.
type Environment struct {
	Name  string
	Hub   Machine
	Hosts []Machine

	// Awaited, if not nil, says which microVMs (NAMESPACE/NAME) somebody waits for:
	// what fails of others is only a warning.
	Awaited func(name string) bool

	// Here, if not nil, looks at the machine that the environment is on.
	Here func(context.Context) []Check
	// Outside, if not nil, finds an address to which packets of the hub's take its
	// default route, and which answers; the zero value if there is none.
	Outside func(context.Context) netip.Addr
	// Hear, if not nil, listens at that address until the context ends. What it returns
	// says from which addresses echo requests have come.
	Hear func(context.Context) (func() []netip.Addr, error)
}

// Status is how a check ended.
type Status string

// The statuses, from best to worst. Warn and Skip do not make a report bad.
const (
	Pass Status = "pass"
	Skip Status = "skip" // not made, and the detail says why
	Warn Status = "warn" // works, but somebody should look
	Fail Status = "fail"
)

// Check is one check, or a heading over others: then it is as good as the worst
// of them.
type Check struct {
	Name     string  `json:"name"`
	Status   Status  `json:"status"`
	Detail   string  `json:"detail"`
	Took     Seconds `json:"took"` // with its children
	Children []Check `json:"children"`

	// Notes is the configuration that was checked, and where it lives.
	Notes []string `json:"-"`
	// Lasting is a failure that stays until somebody mends it.
	Lasting bool `json:"-"`
}

// Seconds is a duration whose JSON is a number of seconds.
type Seconds float64

// Report is a whole inspection. Its JSON is a stable interface.
type Report struct {
	Environment string  `json:"environment"`
	OK          bool    `json:"ok"`
	Checks      []Check `json:"checks"`

	Took time.Duration `json:"-"`
}

// Run inspects env once. When ctx ends, what has not answered has failed.
func Run(ctx context.Context, env Environment) Report {
	start := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := newSurvey(ctx, env)
	steps := []step{s.hubStep()}
	if env.Here != nil {
		steps = append(steps, step{name: "this machine", more: func() []step { return given(env.Here(ctx)) }})
	}
	for _, h := range s.hosts {
		steps = append(steps, s.hostStep(h))
	}
	r := Report{Environment: env.Name, Checks: all(ctx, steps), Took: time.Since(start)}
	r.OK = worst(r.Checks) != Fail
	return r
}

// given are checks that somebody else has made.
func given(checks []Check) []step {
	steps := make([]step, len(checks))
	for i, c := range checks {
		steps[i] = step{name: c.Name, check: func(context.Context) finding {
			return finding{status: c.Status, detail: c.Detail, notes: c.Notes, lasting: c.Lasting}
		}}
	}
	return steps
}

// Bounds of the pause between two inspections of Wait.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = time.Second
)

// Wait inspects env until a report is good, or ctx ends: then the last report
// stands, which was made in full. It calls each, if not nil, with every report.
func Wait(ctx context.Context, env Environment, each func(Report)) Report {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		// The end of the wait must not look like a fault of the environment.
		r := Run(context.WithoutCancel(ctx), env)
		if each != nil {
			each(r)
		}
		if r.OK {
			return r
		}
		select {
		case <-ctx.Done():
			return r
		case <-time.After(pause):
		}
	}
}

// Stuck says whether all that failed stays so until somebody mends it: to wait for
// anything else to happen is in vain.
func (r Report) Stuck() bool {
	stuck := !r.OK
	walk(r.Checks, nil, func(c Check, _ []string) {
		below := slices.ContainsFunc(c.Children, func(child Check) bool { return child.Status == Fail })
		if c.Status == Fail && !below && !c.Lasting {
			stuck = false
		}
	})
	return stuck
}
