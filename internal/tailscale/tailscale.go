// Package tailscale has this machine be a subnet router of a tailnet: it runs the real
// tailscaled, logs it in, has it advertise a route, and says what became of that. It is
// the only package that speaks to tailscaled. It makes no rules of who reaches what, and
// does not choose a peer: that is the tailnet's administrator's affair.
package tailscale

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// Interface is tailscaled's where it has one, and Port its UDP port.
const (
	Interface = "tailscale0"
	Port      = 41641
)

// Socket is where tailscale, the command, looks for tailscaled.
const Socket = "/run/tailscale/tailscaled.sock"

// Addresses are those that a tailnet gives its nodes.
var Addresses = netip.MustParsePrefix("100.64.0.0/10")

// Settings are a router's.
type Settings struct {
	Dir      string // what tailscaled keeps: as whom it is logged in
	LogFile  string // of tailscaled
	KeyFile  string // what lets this machine in
	Server   string // where it logs in; empty: Tailscale's own
	Hostname string
	Route    netip.Prefix
	Forward  func(iface string) error // has the machine forward what comes by an interface
	Log      *slog.Logger
}

// Router keeps tailscaled running, and logged in. It goes on when it can't: what else its
// process does must not end for that. It implements run.Task.
type Router struct {
	s     Settings
	ready chan struct{}
	once  sync.Once

	// Of Run alone.
	key    os.FileInfo   // of the key that was last tried
	failed error         // what came of it
	next   time.Time     // when it is tried again
	delay  time.Duration // after that
	in     bool          // it was logged in since Run began

	mu  sync.Mutex // guards err
	err error      // why nobody comes in; nil: they do
}

// New makes a router of its settings.
func New(s Settings) *Router {
	return &Router{s: s, ready: make(chan struct{}), err: errors.New("it has not begun yet")}
}

// Missing names those of tailscale's programs that this machine has not got.
func Missing() (names []string) {
	for _, name := range []string{"tailscale", "tailscaled"} {
		if _, err := program(name); err != nil {
			names = append(names, name)
		}
	}
	return names
}

// program finds one of tailscale's, also where only root's PATH looks.
func program(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/usr/local/sbin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: install the package tailscale, see https://tailscale.com/download/linux", err)
}

// Times of a router: between two looks where tailscaled has nothing to say, also where
// nobody comes in and where it has just begun, and after it has said something; for one
// login, and between a login that failed and the next.
const (
	rest       = time.Minute
	pause      = 5 * time.Second
	soon       = 500 * time.Millisecond
	moment     = 200 * time.Millisecond
	patience   = 30 * time.Second
	firstDelay = 30 * time.Second
	lastDelay  = 10 * time.Minute
)

// Run has tailscaled run until ctx ends.
func (r *Router) Run(ctx context.Context) error {
	const first, last, steady = 100 * time.Millisecond, 10 * time.Second, 30 * time.Second
	for delay := first; ; delay = min(2*delay, last) {
		began := time.Now()
		err := r.serve(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > steady {
			delay = first
		}
		r.set(err)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil
		}
	}
}

// Ready is closed once the router is logged in.
func (r *Router) Ready() <-chan struct{} { return r.ready }

func (r *Router) String() string { return "tailscale" }

// set notes how the router is, and says what is new of it.
func (r *Router) set(err error) {
	r.mu.Lock()
	was := r.err
	r.err = err
	r.mu.Unlock()
	switch {
	case err == nil:
		r.once.Do(func() { close(r.ready) })
		if was != nil {
			r.s.Log.Info("logged in to the tailnet", "route", r.s.Route)
		}
	case was != nil && was.Error() == err.Error():
	case errors.Is(err, errNotYet):
		r.s.Log.Info("waiting for the tailnet", "err", err)
	default:
		r.s.Log.Error("nobody comes in by Tailscale: it is tried again and again", "err", err)
	}
}

// serve runs one tailscaled, and has it be what the settings say, until it ends.
func (r *Router) serve(ctx context.Context) error {
	d, err := start(r.s.Dir, r.s.LogFile)
	if err != nil {
		return err
	}
	defer d.stop()
	if err := d.answers(ctx); err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watching.Go(func() { watch(ctx, changed) })
	for {
		err := r.tend(ctx)
		r.set(err)
		wait := pause
		switch {
		case err == nil:
			wait = rest
		case errors.Is(err, errNotYet):
			wait = soon
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.ended:
			return d.end()
		case <-changed:
			sleep(ctx, moment) // mostly there is more
		case <-time.After(wait):
		}
	}
}

// errNotYet is what is the matter until tailscaled has spoken with the tailnet.
var errNotYet = errors.New("it has not reached the tailnet yet")

// tend looks how tailscaled is, and changes what is not as it should be.
func (r *Router) tend(ctx context.Context) error {
	state, err := read(ctx)
	if err != nil {
		return err
	}
	if state.status.TUN {
		if err := r.s.Forward(Interface); err != nil {
			return err
		}
	}
	switch {
	case state.status.BackendState == "NoState" && len(state.status.Health) > 0:
		return fmt.Errorf("%w: %s", errNotYet, strings.Join(state.status.Health, " "))
	case state.status.BackendState == "NoState":
		return errNotYet
	case state.prefs.LoggedOut && r.in:
		return errors.New("somebody has logged it out: it logs in when the hub starts next")
	case state.status.BackendState == "NeedsMachineAuth":
		return errors.New("the tailnet's administrator has to let this machine in")
	case state.status.BackendState == "NeedsLogin" || state.prefs.server() != cmp.Or(r.s.Server, usualServer):
		return r.logIn(ctx)
	case state.status.BackendState == "Running" && r.is(state.prefs):
		r.in, r.next, r.delay = true, time.Time{}, 0
		return nil
	case state.status.BackendState == "Starting" && r.is(state.prefs):
		return errNotYet
	}
	if err := r.up(ctx); err != nil {
		return err
	}
	r.in = true
	return nil
}

// is says whether tailscaled is set as it should be.
func (r *Router) is(p prefs) bool {
	return p.WantRunning && !p.CorpDNS && !p.RouteAll && p.NetfilterMode == 0 && p.Hostname == r.s.Hostname && slices.Equal(p.AdvertiseRoutes, []netip.Prefix{r.s.Route})
}

// logIn uses the key, unless it has just failed. Between two tries tailscaled itself asks
// again, with the longer and longer pauses that are its own.
func (r *Router) logIn(ctx context.Context) error {
	key, err := os.Stat(r.s.KeyFile)
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	same := r.key != nil && r.key.ModTime().Equal(key.ModTime()) && os.SameFile(r.key, key)
	if same && time.Now().Before(r.next) {
		return r.failed
	}
	if !same {
		r.delay = 0
	}
	if err := r.up(ctx, "--force-reauth", "--auth-key=file:"+r.s.KeyFile); err != nil {
		r.key, r.delay = key, min(max(2*r.delay, firstDelay), lastDelay)
		r.next, r.failed = time.Now().Add(r.delay), r.why(ctx, err)
		return r.failed
	}
	r.in = true
	return nil
}

// Refused begins the error of a login that the tailnet's server has refused.
const Refused = "log in: the server says: "

// why is why a login has failed, of which the command knows only part.
func (r *Router) why(ctx context.Context, err error) error {
	if _, said, ok := strings.Cut(err.Error(), "backend error: "); ok {
		return errors.New(Refused + said)
	}
	if state, bad := read(ctx); bad == nil && len(state.status.Health) > 0 {
		return fmt.Errorf("log in at %s: %w: %s", cmp.Or(r.s.Server, usualServer), err, strings.Join(state.status.Health, " "))
	}
	return fmt.Errorf("log in at %s: %w", cmp.Or(r.s.Server, usualServer), err)
}

// up has tailscaled be what the settings say. The routes of others are not taken: they may
// be those of this machine's own networks. Nor are rules and names: those are the hub's.
func (r *Router) up(ctx context.Context, how ...string) error {
	args := []string{
		"up", "--reset", "--timeout=" + patience.String(), "--login-server=" + cmp.Or(r.s.Server, usualServer), "--hostname=" + r.s.Hostname,
		"--advertise-routes=" + r.s.Route.String(), "--accept-dns=false", "--accept-routes=false", "--netfilter-mode=off",
		"--accept-risk=all", // of cutting off whoever has started this by way of the machine's own tailnet: it is another one
	}
	return command(ctx, append(args, how...)...)
}

// Forget logs out who was logged in at dir, if anybody was, and removes what was kept of
// it. What could not be told the tailnet is in the error. If ctx ends before, or this machine's
// own tailscaled is in the way, all stays.
func Forget(ctx context.Context, dir, logFile string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	d, err := start(dir, logFile)
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, patience)
		if err = d.answers(limited); err == nil {
			err = logOut(limited)
		}
		cancel()
		d.stop()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, errOther) {
		return err
	}
	if err != nil {
		err = fmt.Errorf("log out of the tailnet, whose administrator may still see this machine: %w", err)
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// logOut has the tailnet forget this machine.
func logOut(ctx context.Context) error {
	state, err := read(ctx)
	if err != nil || state.prefs.LoggedOut {
		return err
	}
	return command(ctx, "logout")
}

// Facts say how a router is.
type Facts struct {
	Error      error // why nobody comes in; nil: they do
	Version    string
	State      string // in tailscaled's words
	Name       string // in the tailnet
	Addresses  []netip.Addr
	Server     string
	Expires    time.Time // the login; zero: never, or there is none
	Expired    bool
	Advertised bool // the route is offered
	Approved   bool // and taken
	Userspace  bool // there is no device for its packets
	Peers      int
}

// Facts say how the router is.
func (r *Router) Facts(ctx context.Context) Facts {
	r.mu.Lock()
	f := Facts{Error: r.err, Server: cmp.Or(r.s.Server, usualServer)}
	r.mu.Unlock()
	state, err := read(ctx)
	if err != nil {
		f.Error = cmp.Or(f.Error, err)
		return f
	}
	status, self := state.status, state.status.Self
	f.Version, f.State, f.Userspace, f.Addresses, f.Peers = status.Version, status.BackendState, !status.TUN, self.TailscaleIPs, len(status.Peer)
	f.Name, f.Expires, f.Expired = self.DNSName, self.KeyExpiry, self.Expired
	f.Advertised = slices.Contains(state.prefs.AdvertiseRoutes, r.s.Route)
	f.Approved = slices.Contains(self.AllowedIPs, r.s.Route) || slices.Contains(self.PrimaryRoutes, r.s.Route)
	return f
}
