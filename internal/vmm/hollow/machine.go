package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/agent"
)

// machine is the hypervisor and its guest.
type machine struct {
	options
	agentServer *agent.Server

	mu      sync.Mutex // guards what follows, and writing to the console and the events
	viewer  net.Conn   // of the console
	paused  bool
	waiting []string // what the console was told while paused
}

// run serves until the guest ends.
func (m *machine) run() {
	fmt.Println(greeting) // the second monitor, whose events go to a file
	m.agentServer = agent.NewServer(agent.Handler{
		Reaper: agent.NewReaper(),
		Info:   func() agent.Info { return agent.Info{Hostname: "hollow"} },
		Shutdown: func(reboot bool) error {
			if m.deaf {
				return nil
			}
			// The host hears that the guest agrees before it is gone.
			time.AfterFunc(5*time.Millisecond+m.slow, func() { m.end(map[bool]string{false: "guest-shutdown", true: "guest-reset"}[reboot]) })
			return nil
		},
	})
	time.Sleep(m.delay)
	if m.reboot > 0 {
		time.AfterFunc(m.reboot, func() { m.end("guest-reset") })
	}
	m.agentServer.Notify(agent.Event{Kind: agent.Ready})
	m.print("guest ready")
	var all sync.WaitGroup
	for fd, serve := range map[int]func(net.Conn){m.qmp: m.monitor, m.console: m.terminal, m.agent: m.talk} {
		if fd <= 0 {
			continue
		}
		l, err := net.FileListener(os.NewFile(uintptr(fd), "socket"))
		if err != nil {
			fmt.Fprintln(os.Stderr, "hollow:", err)
			os.Exit(1)
		}
		all.Go(func() {
			for { // one at a time, as QEMU has it
				conn, err := l.Accept()
				if err != nil {
					return
				}
				serve(conn)
				conn.Close()
			}
		})
	}
	all.Wait()
}

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 0}, "package": "hollow"}, "capabilities": []}}`

// monitor answers QEMU's machine protocol.
func (m *machine) monitor(conn net.Conn) {
	fmt.Fprintln(conn, greeting)
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		var c struct {
			Execute   string          `json:"execute"`
			ID        json.RawMessage `json:"id"`
			Arguments struct {
				Node string `json:"node-name"`
				Size int64  `json:"size"`
			} `json:"arguments"`
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			fmt.Fprintln(conn, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`)
			continue
		}
		result := `"return": {}`
		switch c.Execute {
		case "qmp_capabilities", "system_powerdown", "quit":
		case "query-status":
			status := map[bool]string{false: "running", true: "paused"}[m.isPaused()]
			result = fmt.Sprintf(`"return": {"running": %t, "status": %q}`, status == "running", status)
		case "query-named-block-nodes":
			result = `"return": ` + m.listNodes()
		case "block_resize":
			if err := m.resize(c.Arguments.Node, c.Arguments.Size); err != nil {
				result = fmt.Sprintf(`"error": {"class": "GenericError", "desc": %q}`, err)
			}
		case "stop":
			m.pause(true)
		case "cont":
			m.pause(false)
		default:
			result = fmt.Sprintf(`"error": {"class": "CommandNotFound", "desc": "no command %s"}`, c.Execute)
		}
		fmt.Fprintf(conn, "{%s, \"id\": %s}\n", result, c.ID)
		switch c.Execute {
		case "system_powerdown":
			if !m.deaf {
				m.end("guest-shutdown")
			}
		case "quit":
			m.end("host-qmp-quit")
		}
	}
}

func (m *machine) listNodes() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := []any{}
	for _, n := range m.nodes {
		list = append(list, map[string]any{"node-name": n.name, "image": map[string]any{"virtual-size": n.size}})
	}
	b, _ := json.Marshal(list) // of strings and numbers
	return string(b)
}

// resize sets the size of a disk, and of its file, as QEMU does.
func (m *machine) resize(name string, size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.IndexFunc(m.nodes, func(n node) bool { return n.name == name })
	switch {
	case i < 0:
		return fmt.Errorf("no node %s", name)
	case m.rigid:
		return errors.New("disks do not grow here")
	}
	if err := unix.Ftruncate(m.nodes[i].fd, size); err != nil {
		return err
	}
	m.nodes[i].size = size
	return nil
}

// mark writes a word where the guest sees a disk end.
func (m *machine) mark(serial, word string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.Index(m.disks, serial)
	if i < 0 {
		return fmt.Errorf("no disk %s", serial)
	}
	_, err := unix.Pwrite(m.nodes[i].fd, []byte(word), m.nodes[i].size-int64(len(word)))
	return err
}

func (m *machine) sizes() (list []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.nodes {
		list = append(list, strconv.FormatInt(n.size, 10))
	}
	return list
}

func (m *machine) isPaused() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.paused
}

func (m *machine) pause(paused bool) {
	m.mu.Lock()
	m.paused = paused
	words := m.waiting
	if !paused {
		m.waiting = nil
	}
	m.mu.Unlock()
	if !paused {
		for _, line := range words {
			m.do(line)
		}
	}
}

// terminal is the guest at its console.
func (m *machine) terminal(conn net.Conn) {
	m.mu.Lock()
	m.viewer = conn
	m.mu.Unlock()
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		m.mu.Lock()
		paused := m.paused
		if paused {
			m.waiting = append(m.waiting, lines.Text())
		}
		m.mu.Unlock()
		if !paused {
			m.do(lines.Text())
		}
	}
	m.mu.Lock()
	m.viewer = nil
	m.mu.Unlock()
}

// do does what the suite's guest does for a line on the console.
func (m *machine) do(line string) {
	verb, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	switch verb {
	case "echo":
		m.print("echoed " + rest)
	case "list":
		m.print("disks " + strings.Join(m.disks, " "))
		m.print("nics " + strings.Join(m.nics, " "))
	case "sizes":
		m.print("sizes " + strings.Join(m.sizes(), " "))
	case "mark":
		serial, word, _ := strings.Cut(rest, " ")
		m.print(fmt.Sprint("marked ", m.mark(serial, word)))
	case "poweroff":
		m.end("guest-shutdown")
	case "reboot":
		m.end("guest-reset")
	case "panic":
		m.print("Kernel panic - not syncing: asked to")
		m.end("guest-reset")
	}
}

func (m *machine) print(line string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fmt.Fprintln(m.log, line)
	if m.viewer != nil {
		fmt.Fprintln(m.viewer, line)
	}
}

// talk is the guest's agent.
func (m *machine) talk(conn net.Conn) {
	if m.echo {
		io.Copy(conn, conn)
		return
	}
	m.agentServer.Serve(conn)
}

// end says why, as QEMU does, and goes.
func (m *machine) end(reason string) {
	m.mu.Lock() // for good
	now := time.Now()
	fmt.Printf(`{"timestamp": {"seconds": %d, "microseconds": %d}, "event": "SHUTDOWN", "data": {"guest": true, "reason": %q}}`+"\n",
		now.Unix(), now.Nanosecond()/1000, reason)
	os.Exit(0)
}
