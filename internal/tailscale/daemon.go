package tailscale

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// usualServer is where tailscaled logs in if nobody says another place.
const usualServer = "https://controlplane.tailscale.com"

// daemon is a tailscaled that this process has started.
type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // once it has ended
	log   string
}

// errOther is of a tailscaled that this process has not started, and has nothing to say to.
var errOther = fmt.Errorf("another tailscaled runs at %s, which is this machine's own: systemctl disable --now tailscaled", Socket)

// start starts tailscaled. It ends with this process, however that ends: no other could
// be started beside it.
func start(dir, logFile string) (*daemon, error) {
	if c, err := net.Dial("unix", Socket); err == nil {
		c.Close()
		return nil, errOther
	}
	path, err := program("tailscaled")
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{dir, filepath.Dir(logFile), filepath.Dir(Socket)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c := exec.Command(path, "--state="+filepath.Join(dir, "tailscaled.state"), "--statedir="+dir, "--socket="+Socket,
		fmt.Sprintf("--port=%d", Port), "--tun="+tun(), "--no-logs-no-support")
	c.Stdout, c.Stderr, c.Dir = log, log, "/"
	c.Env = append(os.Environ(), "TS_LOGS_DIR="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true}
	d := &daemon{cmd: c, ended: make(chan struct{}), log: logFile}
	begun := make(chan error)
	go func() { // it owns the thread with which the kernel takes tailscaled to end
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.Start()
		begun <- err
		if err == nil {
			d.err = c.Wait()
			close(d.ended)
		}
	}()
	if err := <-begun; err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	return d, nil
}

// tun is how tailscaled gets at packets.
func tun() string {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return "userspace-networking"
	}
	f.Close()
	return Interface
}

// answers waits until tailscaled does.
func (d *daemon) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		_, err := read(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-d.ended:
			return d.end()
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// end is why tailscaled has ended.
func (d *daemon) end() error {
	return fmt.Errorf("tailscaled has ended, see %s: %v", d.log, d.err)
}

// stop ends tailscaled, and takes away what one that was killed leaves.
func (d *daemon) stop() {
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(5 * time.Second):
		d.cmd.Process.Kill()
		<-d.ended
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	exec.CommandContext(ctx, d.cmd.Path, "--cleanup").Run()
}

// command runs tailscale, the command. Its last line is the error: warnings come before.
func command(ctx context.Context, args ...string) error {
	path, err := program("tailscale")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience+5*time.Second)
	defer cancel()
	var said bytes.Buffer
	c := exec.CommandContext(ctx, path, append([]string{"--socket=" + Socket}, args...)...)
	c.Stdout, c.Stderr = &said, &said
	if err := c.Run(); err != nil {
		lines := strings.Split(strings.TrimSpace(said.String()), "\n")
		return fmt.Errorf("tailscale %s: %s", args[0], cmp.Or(lines[len(lines)-1], err.Error()))
	}
	return nil
}

// status and prefs are what of tailscaled's answers is used here.
type status struct {
	Version      string
	TUN          bool
	BackendState string
	Self         struct {
		DNSName                   string
		TailscaleIPs              []netip.Addr
		AllowedIPs, PrimaryRoutes []netip.Prefix
		KeyExpiry                 time.Time
		Expired                   bool
	}
	Peer   map[string]struct{}
	Health []string
}

type prefs struct {
	ControlURL, Hostname                      string
	RouteAll, CorpDNS, WantRunning, LoggedOut bool
	AdvertiseRoutes                           []netip.Prefix
	NetfilterMode                             int
}

func (p prefs) server() string {
	if p.ControlURL == "" {
		return usualServer
	}
	return p.ControlURL
}

type state struct {
	status status
	prefs  prefs
}

// client speaks with tailscaled, which wants to be called so.
var client = http.Client{
	Timeout: 3 * time.Second,
	Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", Socket)
	}},
}

const local = "http://local-tailscaled.sock/localapi/v0/"

// read asks tailscaled how it is.
func read(ctx context.Context) (s state, err error) {
	if err = get(ctx, "status", &s.status); err == nil {
		err = get(ctx, "prefs", &s.prefs)
	}
	return s, err
}

// watch sends whenever tailscaled has changed, or may have, until ctx ends. What has is for
// read to say, whose form versions keep.
func watch(ctx context.Context, changed chan<- struct{}) {
	patient := http.Client{Transport: client.Transport}
	tell := func() {
		select {
		case changed <- struct{}{}:
		default: // who listens has not looked yet
		}
	}
	for ; ctx.Err() == nil; sleep(ctx, pause) {
		tell() // also where there is nothing to watch
		bus, err := open(ctx, &patient, "watch-ipn-bus?mask="+busMask)
		if err != nil {
			continue
		}
		for messages := json.NewDecoder(bus); err == nil; err = messages.Decode(&struct{}{}) {
			tell()
		}
		bus.Close()
	}
}

// busMask has tailscaled send no netmaps, which can be long.
const busMask = "8192"

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func get(ctx context.Context, what string, into any) error {
	answer, err := open(ctx, &client, what)
	if err != nil {
		return err
	}
	defer answer.Close()
	if err := json.NewDecoder(answer).Decode(into); err != nil {
		return fmt.Errorf("ask tailscaled for its %s: %w", what, err)
	}
	return nil
}

// open asks tailscaled for something, and is the beginning of its answer.
func open(ctx context.Context, by *http.Client, what string) (io.ReadCloser, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, local+what, nil)
	if err != nil {
		return nil, err
	}
	answer, err := by.Do(r)
	if err == nil && answer.StatusCode != http.StatusOK {
		answer.Body.Close()
		err = errors.New(answer.Status)
	}
	if err != nil {
		return nil, fmt.Errorf("ask tailscaled for its %s: %w", what, err)
	}
	return answer.Body, nil
}
