package lab

import (
	"bufio"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/firewalld"
	"ingot/internal/link"
	"ingot/internal/logfile"
	"ingot/internal/run"
)

// Back-off between restarts of a role that dies, and how long it must live for
// the back-off to begin anew.
const (
	firstDelay = 100 * time.Millisecond
	lastDelay  = 10 * time.Second
	steady     = 30 * time.Second
)

// stopTime is how long a role may take to end when it is asked to.
const stopTime = 10 * time.Second

// Start starts the lab's supervisor and with it the roles, as far as they don't
// run as they should, and returns when all of them have been started. A new
// binary, or new arguments, restart a role.
func (l *Lab) Start(ctx context.Context) error {
	if err := l.supervise(ctx); err != nil {
		return err
	}
	return l.settle(ctx)
}

// settle waits until every role is the one that is wanted. The supervisor is
// another process: its notes are looked at, for the moment that it takes.
func (l *Lab) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*stopTime)
	defer cancel()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for {
		late := l.unsettled()
		if late == "" {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("start %s, see %s: %w", late, filepath.Join(l.Dir, "log", "supervisor.log"), context.Cause(ctx))
		}
	}
}

// unsettled names a role that does not run as it should.
func (l *Lab) unsettled() string {
	for _, m := range l.Machines {
		for _, r := range m.Roles {
			print, err := l.fingerprint(m.Name, r)
			if err != nil {
				return r.Name + " on " + m.Name
			}
			s, err := readRole(l.rolePath(m.Name, r.Name))
			if err != nil || s.Print != print || !s.alive() {
				return r.Name + " on " + m.Name
			}
		}
	}
	return ""
}

// supervise starts the supervisor, or tells it what is wanted now.
func (l *Lab) supervise(ctx context.Context) error {
	b, err := json.MarshalIndent(l.Config, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(l.configPath(), b, 0o600); err != nil {
		return err
	}
	print, err := l.fingerprint("", Role{})
	if err != nil {
		return err
	}
	if s, err := l.supervisor(); err == nil {
		if s.Print == print {
			return l.tell(unix.SIGHUP)
		}
		if err := l.stopSupervisor(ctx); err != nil {
			return err
		}
	}
	return l.spawnSupervisor(print)
}

func (l *Lab) configPath() string { return filepath.Join(l.RunDir, "lab.json") }

const supervisorFile = "supervisor.json"

func (l *Lab) supervisorPath() string { return filepath.Join(l.RunDir, supervisorFile) }

// spawnSupervisor starts the supervisor, notes which process it is, and only then
// lets it begin: one that nobody knows of would start roles for ever.
func (l *Lab) spawnSupervisor(print string) error {
	log, err := appendTo(filepath.Join(l.Dir, "log", "supervisor.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(l.Binary, "lab", "supervise", l.RunDir)
	c.Stdout, c.Stderr, c.Dir = log, log, "/"
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	word, err := c.StdinPipe()
	if err != nil {
		return err
	}
	defer word.Close()
	if err := c.Start(); err != nil {
		return fmt.Errorf("start supervisor of lab %s: %w", l.Name, err)
	}
	start, err := run.StartTime(c.Process.Pid)
	if err != nil {
		return fmt.Errorf("start supervisor of lab %s: it ended at once, see %s: %w", l.Name, log.Name(), err)
	}
	// Without a fingerprint it is one that does not listen yet: the next `up` ends it.
	if err := writeJSON(l.supervisorPath(), RoleState{PID: c.Process.Pid, Start: start, Since: time.Now()}); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(word, "%s%s\n", begin, print); err != nil {
		return fmt.Errorf("start supervisor of lab %s: %w", l.Name, err)
	}
	return nil
}

// begin is what a new supervisor waits to hear, with its own fingerprint behind it.
const begin = "begin "

func (l *Lab) supervisor() (RoleState, error) {
	s, err := readRole(l.supervisorPath())
	if err != nil {
		return s, err
	}
	if !s.alive() {
		return s, fmt.Errorf("supervisor: %w", errdefs.ErrNotFound)
	}
	return s, nil
}

// Supervised says whether the supervisor runs.
func (l *Lab) Supervised() bool {
	_, err := l.supervisor()
	return err == nil
}

func (l *Lab) tell(sig unix.Signal) error {
	s, err := l.supervisor()
	if err != nil {
		return err
	}
	p, err := run.FindProcess(s.PID, s.Start)
	if err != nil {
		return err
	}
	defer p.Close()
	return p.Signal(sig)
}

// stopSupervisor ends the supervisor. The roles run on.
func (l *Lab) stopSupervisor(ctx context.Context) error {
	s, err := readRole(l.supervisorPath())
	if err != nil {
		return nil
	}
	p, err := run.FindProcess(s.PID, s.Start)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return p.Stop(ctx)
}

func (s RoleState) alive() bool {
	if s.PID == 0 {
		return false
	}
	start, err := run.StartTime(s.PID)
	return err == nil && start == s.Start
}

// fingerprint changes when what the binary was built from does, or the role's
// arguments or files. A binary that was built again from the same sources is the
// same, also with another version stamped on it: a commit restarts nothing.
func (l *Lab) fingerprint(machine string, r Role) (string, error) {
	id, err := buildID(l.Binary)
	if err != nil {
		return "", fmt.Errorf("find the ingot binary: %w", err)
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%s %q", id, r.Args)
	for _, path := range r.Files {
		b, err := os.ReadFile(filepath.Join(l.files(machine), path))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("read what %s on %s reads: %w", r.Name, machine, err)
		}
		fmt.Fprintf(sum, "%s %d %s", path, len(b), b)
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:16]), nil
}

// buildID names all that a binary was compiled from.
func buildID(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	section := f.Section(".note.go.buildid")
	if section == nil {
		return "", fmt.Errorf("%s has no Go build id", path)
	}
	id, err := section.Data()
	if err != nil {
		return "", err
	}
	// Linking, compiling, compiled, linked (cmd/go/internal/work/buildid.go): the first
	// and the last know of -ldflags, and so of the version.
	if parts := strings.Split(string(id), "/"); len(parts) == 4 {
		return parts[1] + "/" + parts[2], nil
	}
	return string(id), nil
}

// Supervise is the supervisor's body: it keeps the roles of the lab that is
// described in runDir running until ctx ends. SIGHUP reads the description anew.
// It begins when in says so, and not at all if its starter was killed before.
func Supervise(ctx context.Context, runDir string, in io.Reader, log *slog.Logger) error {
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGHUP)
	defer signal.Stop(again)
	line, err := bufio.NewReader(in).ReadString('\n')
	print, told := strings.CutPrefix(strings.TrimSpace(line), begin)
	if err != nil || !told {
		return fmt.Errorf("supervise %s: whoever started this has not said to begin: %w", runDir, errors.Join(err, io.ErrUnexpectedEOF))
	}
	lock, err := Lock(ctx, filepath.Join(runDir, "supervisor.lock"), nil)
	if err != nil {
		return err
	}
	defer lock.Release()
	// From now on it hears SIGHUP, and whoever reads this may send one.
	start, err := run.StartTime(os.Getpid())
	if err == nil {
		err = writeJSON(filepath.Join(runDir, supervisorFile), RoleState{PID: os.Getpid(), Start: start, Since: time.Now(), Print: print})
	}
	if err != nil {
		return err
	}
	keepers := map[string]*keeper{}
	var running sync.WaitGroup
	defer running.Wait()
	logs, err := logfile.Open([]string{".log"}, log)
	if err == nil {
		running.Go(func() { err := logs.Run(ctx); logUnbounded(log, err) })
	}
	logUnbounded(log, err)
	if l, err := Open(runDir); err == nil {
		running.Go(func() { firewalld.Keep(ctx, l.firewalld(), nil, log) })
	}
	for {
		l, err := Open(runDir)
		if err != nil {
			return err
		}
		if logs != nil {
			logUnbounded(log, logs.Add(filepath.Join(l.Dir, "log")))
		}
		for _, m := range l.Machines {
			for _, r := range m.Roles {
				key := m.Name + "/" + r.Name
				k := keepers[key]
				if k == nil {
					k = &keeper{want: make(chan wanted, 1), log: log.With("machine", m.Name, "role", r.Name)}
					keepers[key] = k
					running.Go(func() { k.run(ctx) })
				}
				k.set(wanted{lab: l, machine: m.Name, role: r})
			}
		}
		select {
		case <-ctx.Done():
			// Who finds it on its way out must not rely on it: without a fingerprint it
			// is one that does not listen.
			return writeJSON(filepath.Join(runDir, supervisorFile), RoleState{PID: os.Getpid(), Start: start})
		case <-again:
		}
	}
}

// logUnbounded says that logs may grow, which is no reason to keep no roles.
func logUnbounded(log *slog.Logger, err error) {
	if err != nil {
		log.Warn("logs are not bounded", "err", err)
	}
}

// Open finds the lab whose run-time directory this is, as it was last started.
func Open(runDir string) (*Lab, error) {
	b, err := os.ReadFile(filepath.Join(runDir, "lab.json"))
	if err != nil {
		return nil, err
	}
	l := &Lab{}
	if err := json.Unmarshal(b, &l.Config); err != nil {
		return nil, fmt.Errorf("read description of lab: %w", err)
	}
	return l, nil
}

// keeper keeps one role running. One goroutine owns it.
type keeper struct {
	want chan wanted
	log  *slog.Logger
}

type wanted struct {
	lab     *Lab
	machine string
	role    Role
}

// set replaces what the keeper has not read yet.
func (k *keeper) set(w wanted) {
	select {
	case <-k.want:
	default:
	}
	k.want <- w
}

func (k *keeper) run(ctx context.Context) {
	var w wanted
	select {
	case w = <-k.want:
	case <-ctx.Done():
		return
	}
	delay := firstDelay
	restarts := 0
	for ctx.Err() == nil {
		p, since, err := k.ensure(ctx, w, restarts)
		if err != nil {
			k.log.Error("start role", "err", err, "again", delay)
		} else {
			next, changed := k.watch(ctx, p)
			p.Close()
			if ctx.Err() != nil {
				return
			}
			if changed {
				w, delay, restarts = next, firstDelay, 0
				continue
			}
			restarts++
			if time.Since(since) > steady {
				delay = firstDelay
			}
			k.log.Warn("role ended", "pid", p.PID, "after", time.Since(since).Round(time.Millisecond), "again", delay)
		}
		select {
		case <-time.After(delay):
			delay = min(2*delay, lastDelay)
		case w = <-k.want:
			delay = firstDelay
		case <-ctx.Done():
		}
	}
}

// watch waits until the role ends, or something else is wanted of it.
func (k *keeper) watch(ctx context.Context, p *run.Process) (next wanted, changed bool) {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	go func() { p.Wait(waiting); close(ended) }()
	select {
	case <-ended:
		return wanted{}, false
	case next = <-k.want:
		cancel()
		<-ended
		return next, true
	}
}

// ensure finds the role running as it should, or starts it.
func (k *keeper) ensure(ctx context.Context, w wanted, restarts int) (*run.Process, time.Time, error) {
	path := w.lab.rolePath(w.machine, w.role.Name)
	print, err := w.lab.fingerprint(w.machine, w.role)
	if err != nil {
		return nil, time.Time{}, err
	}
	if was, err := readRole(path); err == nil {
		p, err := run.FindProcess(was.PID, was.Start)
		if err == nil && was.Print == print {
			return p, was.Since, nil
		}
		if err == nil {
			k.log.Info("role changed: restarting it", "pid", was.PID)
			stopping, cancel := context.WithTimeout(ctx, stopTime)
			err := p.Stop(stopping)
			cancel()
			p.Close()
			if err != nil {
				return nil, time.Time{}, err
			}
		}
	}
	return k.start(w, print, restarts)
}

func (k *keeper) start(w wanted, print string, restarts int) (*run.Process, time.Time, error) {
	log, err := appendTo(w.lab.LogPath(w.machine, w.role.Name))
	if err != nil {
		return nil, time.Time{}, err
	}
	defer log.Close()
	ns, err := link.OpenNamespace(w.lab.pin(w.machine))
	if err != nil {
		return nil, time.Time{}, err
	}
	defer ns.Close()
	c := exec.Command(w.lab.Binary, w.role.Args...)
	c.Stdout, c.Stderr, c.Dir = log, log, "/"
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := ns.Start(c); err != nil {
		return nil, time.Time{}, err
	}
	state := RoleState{Name: w.role.Name, PID: c.Process.Pid, Restarts: restarts, Since: time.Now(), Print: print}
	p, err := note(w.lab.rolePath(w.machine, w.role.Name), state)
	if err != nil {
		// One that nobody knows of would run beside the next.
		c.Process.Kill()
		c.Wait()
		return nil, time.Time{}, err
	}
	k.log.Info("role started", "pid", p.PID, "restarts", restarts)
	return p, state.Since, nil
}

// note writes down which process a role is, and holds it.
func note(path string, s RoleState) (*run.Process, error) {
	p, err := run.FindProcess(s.PID, 0)
	if err != nil {
		return nil, err
	}
	if s.Start, err = run.StartTime(s.PID); err == nil {
		err = writeJSON(path, s)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, b, 0o600)
}

func appendTo(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	return f, errors.Join(err)
}

// Restart restarts one role. The supervisor starts it again at once.
func (l *Lab) Restart(ctx context.Context, machine, role string) error {
	s, err := readRole(l.rolePath(machine, role))
	if err != nil {
		return fmt.Errorf("restart %s on %s: %w", role, machine, err)
	}
	p, err := run.FindProcess(s.PID, s.Start)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("restart %s on %s (pid %s): %w", role, machine, strconv.Itoa(s.PID), err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	return p.Stop(ctx)
}
