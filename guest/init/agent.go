package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/agent"
)

func newServer(h agent.Handler) *agent.Server {
	h.Info = info
	return agent.NewServer(h)
}

// complete gives a command what the image's process has, where it says nothing of
// its own; Main is that process.
func (p process) complete(c agent.Command) agent.Command {
	if c.Main {
		c.Args, c.Dir, c.User = p.Args, p.Dir, p.User
	}
	env := maps.Clone(p.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, c.Env)
	c.Env = env
	if c.Dir == "" {
		c.Dir = p.Dir
	}
	if c.User == "" {
		c.User = p.User
	}
	return c
}

// serve answers the host, and tells it of changed addresses, until ctx ends.
func serve(ctx context.Context, s *agent.Server) {
	go watchAddresses(ctx, func(a []netip.Addr) {
		s.Notify(agent.Event{Kind: agent.Address, Addresses: a})
	})
	for ctx.Err() == nil {
		p, err := openPort(ctx)
		if err == nil {
			err = errors.Join(s.Serve(p), p.file.Close())
		}
		if err != nil && ctx.Err() == nil {
			say("talk to the host: %v", err)
		}
		pause(ctx, portWait)
	}
}

// portWait is how long a port that failed is left alone.
const portWait = time.Second

func info() agent.Info {
	i := agent.Info{Addresses: addresses()}
	if name, err := os.Hostname(); err == nil {
		i.Hostname = name
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		i.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) == nil {
		i.Uptime = time.Duration(t.Nano())
	}
	return i
}

// addresses are the guest's, without loopback and link-local ones.
func addresses() []netip.Addr {
	b, err := syscall.NetlinkRIB(syscall.RTM_GETADDR, syscall.AF_UNSPEC)
	if err != nil {
		return nil
	}
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return nil
	}
	var list []netip.Addr
	for _, m := range messages {
		if m.Header.Type != syscall.RTM_NEWADDR {
			continue
		}
		attributes, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			continue
		}
		if a, ok := addressOf(attributes); ok {
			list = append(list, a)
		}
	}
	return list
}

// addressOf prefers the local end of a point-to-point address.
func addressOf(attributes []syscall.NetlinkRouteAttr) (netip.Addr, bool) {
	var found netip.Addr
	for _, a := range attributes {
		if a.Attr.Type != unix.IFA_LOCAL && (a.Attr.Type != unix.IFA_ADDRESS || found.IsValid()) {
			continue
		}
		if addr, ok := netip.AddrFromSlice(a.Value); ok {
			found = addr
		}
	}
	return found, found.IsGlobalUnicast() // neither loopback, link-local, nor none
}

// watchAddresses calls changed with the addresses, at first and after each
// change, until ctx ends.
func watchAddresses(ctx context.Context, changed func([]netip.Addr)) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		report(fmt.Errorf("watch addresses: %w", err))
		return
	}
	f := os.NewFile(uintptr(fd), "addresses")
	defer f.Close()
	groups := uint32(1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1))
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		report(fmt.Errorf("watch addresses: %w", err))
		return
	}
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 8192)
	last := ""
	for {
		now := addresses()
		if text := fmt.Sprint(now); text != last {
			if last != "" || len(now) > 0 {
				changed(now)
			}
			last = text
		}
		// An error that is not ctx's end is a full buffer: something changed.
		if _, err := f.Read(buf); err != nil && ctx.Err() != nil {
			return
		}
	}
}

// runAgent is the agent beside an image's own init.
func runAgent() error {
	o, err := readOptions()
	if err != nil {
		return err
	}
	ctx := context.Background()
	reaper := agent.NewReaper()
	s := newServer(agent.Handler{
		Reaper:   reaper,
		Shutdown: func(reboot bool) error { return askInit(reaper, reboot) },
		Command: func(c agent.Command) (agent.Command, error) {
			c = o.process.complete(c)
			c.Main = false // that is the image's init
			return c, nil
		},
	})
	s.Notify(agent.Event{Kind: agent.Ready, Addresses: addresses()})
	if len(os.Args) > 2 && os.Args[2] == "network" {
		n := startNetwork(ctx, o)
		n.useRoot("/etc")
	}
	go followDisks(ctx) // for the machine's life
	serve(ctx, s)
	return nil
}

// systemd's signals for the start of a power-off and of a restart, from
// systemd(1): SIGRTMIN+4 and +5, as the C library counts.
const (
	sigPowerOff = syscall.Signal(34 + 4)
	sigReboot   = syscall.Signal(34 + 5)
)

// initWait is what another init has to end the machine before it is ended for it.
const initWait = 30 * time.Second

// askInit has the init that is in charge end the machine.
func askInit(reaper *agent.Reaper, reboot bool) error {
	if initIsSystemd() {
		if reboot {
			return syscall.Kill(1, sigReboot)
		}
		return syscall.Kill(1, sigPowerOff)
	}
	name := "poweroff"
	if reboot {
		name = "reboot"
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if _, err := reaper.Start(agent.Command{Args: []string{name}}, [3]*os.File{null, null, null}); err != nil {
		return switchOff(reboot)
	}
	time.AfterFunc(initWait, func() { report(switchOff(reboot)) })
	return nil
}

func initIsSystemd() bool {
	b, err := os.ReadFile("/proc/1/comm")
	return err == nil && strings.TrimSpace(string(b)) == "systemd"
}
