package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/agent"
)

// machine is a guest whose PID 1 is this process.
type machine struct {
	o      options
	reaper *agent.Reaper
	server *agent.Server
	end    chan ending

	// Of a process that waits for a host: only one gets it.
	asked   atomic.Bool
	started chan *agent.Process
	ended   chan int
}

// ending is how a machine ends: off, or started again.
type ending struct{ reboot bool }

const (
	// mainWait is what the image's process has between being asked to end and being
	// killed (docker's is the same), and stopWait what all others have.
	mainWait = 10 * time.Second
	stopWait = 5 * time.Second
	// flushWait is how long the host may take to confirm an exit code.
	flushWait = 2 * time.Second
)

func newMachine(o options) *machine {
	m := &machine{
		o: o, reaper: agent.NewReaper(), end: make(chan ending, 1),
		started: make(chan *agent.Process, 1), ended: make(chan int, 1),
	}
	m.server = newServer(agent.Handler{
		Reaper:   m.reaper,
		Shutdown: func(reboot bool) error { m.shutDown(reboot); return nil },
		Command:  m.command,
		Started:  func(p *agent.Process) { m.started <- p },
		Ended:    func(code int) { m.ended <- code },
	})
	return m
}

// command completes what the host asks for.
func (m *machine) command(c agent.Command) (agent.Command, error) {
	switch {
	case c.Main && !m.o.process.Attach:
		return c, &agent.Error{Code: 126, Text: "the microVM's own process does not wait to be attached to"}
	case c.Main && !m.asked.CompareAndSwap(false, true):
		return c, &agent.Error{Code: 126, Text: "the microVM's own process runs already"}
	}
	return m.o.process.complete(c), nil
}

// shutDown asks for the machine's end. The first one counts.
func (m *machine) shutDown(reboot bool) {
	select {
	case m.end <- ending{reboot}:
	default:
	}
}

// run starts the process and the agent, and ends the machine when it is time.
func (m *machine) run(ctx context.Context, late lateModules) error {
	go serve(ctx, m.server) // for the machine's life
	go followDisks(ctx)     // likewise
	signals := make(chan os.Signal, 1)
	// Control-Alt-Delete, and what other inits take for power-off and restart.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGUSR2)
	prepareFor(m.o.process)
	var main *agent.Process
	var done <-chan struct{}
	if len(m.o.process.Args) > 0 && !m.o.process.Attach {
		var err error
		if main, err = m.start(); err != nil {
			m.exited(err)
			return m.halt(false, nil)
		}
		done = main.Done()
	}
	m.server.Notify(agent.Event{Kind: agent.Ready, Addresses: addresses()})
	go func() { // for the machine's life
		late.load()
		watchPowerButton(func() { m.shutDown(false) })
	}()
	for {
		select {
		case main = <-m.started:
			continue
		case <-done:
			m.tell(main.Code())
			return m.halt(false, nil)
		case code := <-m.ended:
			m.tell(code)
			return m.halt(false, nil)
		case e := <-m.end:
			return m.halt(e.reboot, main)
		case s := <-signals:
			return m.halt(s != syscall.SIGUSR2, main)
		}
	}
}

// prepareFor makes what the images of containers find in one.
func prepareFor(p process) {
	if filepath.IsAbs(p.Dir) {
		if err := os.MkdirAll(p.Dir, 0o755); err != nil && !isReadOnly(err) {
			say("%v", err)
		}
	}
	// Many images' users are not root, and listen on port 80, or ping.
	for file, text := range map[string]string{"ip_unprivileged_port_start": "0", "ping_group_range": "0 2147483647"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+file, []byte(text), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			say("%v", err)
		}
	}
	// As container engines do, since nobody else is here to share with.
	report(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: maxFiles, Max: maxFiles}))
}

const maxFiles = 1 << 20

// exited tells of a process that did not even start.
func (m *machine) exited(err error) {
	say("%v", err)
	code := 126
	var e *agent.Error
	if errors.As(err, &e) {
		code = e.Code
	}
	m.tell(code)
}

// tell gives the host the exit code, and waits until it has it.
func (m *machine) tell(code int) {
	say("process ended with code %d", code)
	ctx, cancel := context.WithTimeout(context.Background(), flushWait)
	defer cancel()
	m.server.Notify(agent.Event{Kind: agent.Exited, Code: code})
	m.server.Flush(ctx) // a host that does not listen finds it in the console's log
}

// start runs the image's process on the console, which is its terminal.
func (m *machine) start() (*agent.Process, error) {
	console, err := os.OpenFile(consoleDevice(), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer console.Close()
	p := m.o.process
	cmd := agent.Command{Args: p.Args, Env: p.Env, Dir: p.Dir, User: p.User, TTY: true}
	return m.reaper.Start(cmd, [3]*os.File{console, console, console})
}

// consoleDevice is the terminal behind /dev/console, which itself can control
// no session.
func consoleDevice() string {
	b, err := os.ReadFile("/sys/class/tty/console/active")
	if f := strings.Fields(string(b)); err == nil && len(f) > 0 {
		return "/dev/" + f[len(f)-1]
	}
	return "/dev/console"
}

// halt ends all processes, writes everything to the disks and ends the machine.
func (m *machine) halt(reboot bool, main *agent.Process) error {
	m.endProcesses(main)
	return switchOff(reboot || m.o.powerOff == "reboot")
}

func (m *machine) endProcesses(main *agent.Process) {
	if main != nil {
		m.endMain(main)
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopWait)
	defer cancel()
	syscall.Kill(-1, syscall.SIGTERM)
	syscall.Kill(-1, syscall.SIGCONT)
	if m.reaper.Wait(ctx) != nil {
		syscall.Kill(-1, syscall.SIGKILL)
		m.reaper.Wait(context.WithoutCancel(ctx))
	}
}

// endMain asks the image's process to end by the signal that it wants, and
// waits. Its children are its own to end, in its own order.
func (m *machine) endMain(main *agent.Process) {
	asked := stopSignal(m.o.process.StopSignal)
	syscall.Kill(main.PID, asked)
	syscall.Kill(main.PID, syscall.SIGCONT)
	if ignores(main.PID, asked) { // a shell; its terminal is going
		syscall.Kill(-main.PID, syscall.SIGHUP)
	}
	timer := time.NewTimer(mainWait)
	defer timer.Stop()
	select {
	case <-main.Done():
		if m.o.process.Attach {
			select { // its host gets all that it has written
			case <-m.ended:
			case <-timer.C:
			}
		}
		m.tell(main.Code())
	case <-timer.C:
		say("the process does not end by %v: it is killed", asked)
	}
}

// stopSignal is a signal by its name or number: SIGTERM if it is neither.
func stopSignal(name string) syscall.Signal {
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n <= lastSignal {
		return syscall.Signal(n)
	}
	name = strings.ToUpper(name)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if s := unix.SignalNum(name); s != 0 {
		return s
	}
	for base, from := range map[string]int{"SIGRTMIN": 34, "SIGRTMAX": lastSignal} { // as the C library counts
		if rest, ok := strings.CutPrefix(name, base); ok {
			if rest == "" {
				return syscall.Signal(from)
			}
			if n, err := strconv.Atoi(rest); err == nil && from+n >= 34 && from+n <= lastSignal {
				return syscall.Signal(from + n)
			}
		}
	}
	return syscall.SIGTERM
}

const lastSignal = 64

// ignores says whether a process ignores a signal.
func ignores(pid int, s syscall.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if hex, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && mask>>(s-1)&1 == 1
		}
	}
	return false
}

// switchOff ends the machine. It does not return, unless the kernel refuses.
func switchOff(reboot bool) error {
	unix.Sync()
	unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // busy files keep it writable; it is synced
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	return unix.Reboot(how)
}

// watchPowerButton calls pressed at each press of the power button, for the
// machine's life.
func watchPowerButton(pressed func()) {
	devices, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		return
	}
	for _, d := range devices {
		f, err := os.OpenFile(d, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		go readKeys(f, pressed) // for the machine's life
	}
}

// pressedPower is a struct input_event, without its time: EV_KEY, KEY_POWER, down.
var pressedPower = []byte{1, 0, 116, 0, 1, 0, 0, 0}

func readKeys(f *os.File, pressed func()) {
	defer f.Close()
	const eventSize = 24
	buf := make([]byte, 16*eventSize)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		for b := buf[:n]; len(b) >= eventSize; b = b[eventSize:] {
			if bytes.Equal(b[16:eventSize], pressedPower) {
				pressed()
			}
		}
	}
}

func isReadOnly(err error) bool { return errors.Is(err, unix.EROFS) }
