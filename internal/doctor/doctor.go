// Package doctor looks at a machine for all that `ingot up`, or what it brings up,
// needs of it: each check says what is wrong, what that breaks and what mends it,
// and many can mend it themselves. `ingot up` makes those of them that would stop
// it. It owns nothing, and changes nothing unless it is told to mend.
package doctor

import (
	"context"
	"net/netip"
	"sync"
)

// Status is how a check ended.
type Status string

// The statuses; their texts are part of `ingot doctor -o json`.
const (
	Pass Status = "pass"
	Skip Status = "skip" // not made, and the detail says why
	Warn Status = "warn" // `ingot up` works, and something else does not, or not well
	Fail Status = "fail" // `ingot up` will not work
)

// Finding is what a check found.
type Finding struct {
	Name    string `json:"name"`
	Status  Status `json:"status"`
	Detail  string `json:"detail"`  // what is wrong, or how it is
	Breaks  string `json:"breaks"`  // what does not work because of it
	Fix     string `json:"fix"`     // what mends it
	Fixable bool   `json:"fixable"` // Mend does that
	mend    func(context.Context) error
}

// Wrong says whether something is to be mended.
func (f Finding) Wrong() bool { return f.Status == Warn || f.Status == Fail }

// Mend does what Fix says. It is to be called on what is Fixable; the next Look
// says whether it has helped.
func (f Finding) Mend(ctx context.Context) error { return f.mend(ctx) }

// mendedBy adds how a finding is mended by this program.
func (f Finding) mendedBy(mend func(context.Context) error) Finding {
	f.Fixable, f.mend = true, mend
	return f
}

func pass(detail string) Finding { return Finding{Status: Pass, Detail: detail} }

func skip(detail string) Finding { return Finding{Status: Skip, Detail: detail} }

func warn(detail, breaks, fix string) Finding {
	return Finding{Status: Warn, Detail: detail, Breaks: breaks, Fix: fix}
}

func fail(detail, breaks, fix string) Finding {
	return Finding{Status: Fail, Detail: detail, Breaks: breaks, Fix: fix}
}

// unseen is a check that could not be made.
func unseen(err error) Finding {
	return warn("cannot be seen: "+err.Error(), "nobody knows", "find out why")
}

// Check is one thing to look at.
type Check struct {
	Name string
	Stop bool // it may find what stops `ingot up`
	Look func(context.Context, Patient) Finding
}

// Patient is this machine, with the environment that it has, or is to have.
type Patient struct {
	Dir      string         // where environments are kept
	Exists   bool           // the environment is there already
	Device   string         // this machine's end of the way to the hub
	Networks []netip.Prefix // the environment's own, or those that it would take first
	Taken    []netip.Prefix // other environments'
	Others   []string       // other environments' devices
	CA       string         // the file of the environment's CA
	Machines []Machine      // those of the environment that are up
	Hosts    int            // how many microVM hosts it has, up or not
}

// Machine is one of the environment's.
type Machine struct {
	Name    string
	Hub     bool
	Address netip.Addr
	Segment string                   // the interface
	Ports   []Port                   // that its roles listen on
	Roles   [][]string               // the arguments that each of its roles runs with
	Inside  func(func() error) error // calls in its network namespace
}

// Port is one that a role listens on.
type Port struct {
	Protocol string // tcp, udp
	Number   uint16
}

// Checks are all checks, in the order in which they are shown: what others build
// on comes first.
func Checks() []Check {
	return []Check{
		{"root", true, lookRoot},
		{"tun", true, lookTun},
		{"namespaces", true, lookNamespaces},
		{"packages", true, lookPackages},
		{"kvm", false, lookKVM},
		{"memory", true, lookMemory},
		{"disk", true, lookDisk},
		{"reflink", true, lookReflink},
		{"loop", true, lookLoop},
		{"forwarding", true, lookForwarding},
		{"firewall", false, lookFirewall},
		{"subnets", true, lookSubnets},
		{"ports", true, lookPorts},
		{"dhcp", false, lookDHCP},
		{"bridges", false, lookBridges},
		{"inotify", true, lookInotify},
		{"clock", true, lookClock},
	}
}

// Stops are the checks that may find what stops `ingot up`.
func Stops() []Check {
	var some []Check
	for _, c := range Checks() {
		if c.Stop {
			some = append(some, c)
		}
	}
	return some
}

// Report is all that was found, in the order of the checks.
type Report struct {
	OK     bool      `json:"ok"` // nothing stops `ingot up`
	Checks []Finding `json:"checks"`
}

// Look makes checks, all at the same time.
func Look(ctx context.Context, p Patient, checks []Check) Report {
	r := Report{OK: true, Checks: make([]Finding, len(checks))}
	var looking sync.WaitGroup
	for i, c := range checks {
		looking.Go(func() {
			r.Checks[i] = c.Look(ctx, p)
			r.Checks[i].Name = c.Name
		})
	}
	looking.Wait()
	for _, f := range r.Checks {
		r.OK = r.OK && f.Status != Fail
	}
	return r
}
