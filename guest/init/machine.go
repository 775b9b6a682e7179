package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
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
}

// ending is how a machine ends: off, or started again.
type ending struct{ reboot bool }

const (
	// stopWait is what processes have between being asked to end and being killed.
	stopWait = 5 * time.Second
	// flushWait is how long the host may take to confirm an exit code.
	flushWait = 2 * time.Second
)

func newMachine(o options) *machine {
	m := &machine{o: o, reaper: agent.NewReaper(), end: make(chan ending, 1)}
	m.server = newServer(m.reaper, func(reboot bool) error { m.shutDown(reboot); return nil })
	return m
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
	signals := make(chan os.Signal, 1)
	// Control-Alt-Delete, and what other inits take for power-off and restart.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGUSR2)
	var main *agent.Process
	var done <-chan struct{}
	if m.o.hasProcess {
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
	select {
	case <-done:
		say("process ended with code %d", main.Code())
		m.tell(main.Code())
		return m.halt(false, nil)
	case e := <-m.end:
		return m.halt(e.reboot, main)
	case s := <-signals:
		return m.halt(s != syscall.SIGUSR2, main)
	}
}

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
	ctx, cancel := context.WithTimeout(context.Background(), stopWait)
	defer cancel()
	syscall.Kill(-1, syscall.SIGTERM)
	syscall.Kill(-1, syscall.SIGCONT)
	if main != nil {
		syscall.Kill(-main.PID, syscall.SIGHUP) // a shell ignores SIGTERM, and its terminal is going
	}
	if m.reaper.Wait(ctx) != nil {
		syscall.Kill(-1, syscall.SIGKILL)
		m.reaper.Wait(context.WithoutCancel(ctx))
	}
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
