// Package agent is the conversation between a host and the small program in its
// guest: is it ready, which addresses has it, run this command, shut down. It
// owns the framing, its client (used by the host) and its server (used by the
// guest), over one byte stream that may be cut at any byte and taken up by
// another host at any time. It finds no ports and dials nothing; whoever has
// the stream hands it over. Standard library only: the guest's program is small.
//
// What comes from a guest is whatever the guest's root wants it to be. A client
// bounds what it keeps of it and believes none of it about anyone else.
package agent

import (
	"errors"
	"net/netip"
	"time"
)

// Port is the name of the virtio-serial port that carries the conversation.
const Port = "org.ingot.agent.0"

// ErrClosed is the error of a conversation that has ended.
var ErrClosed = errors.New("agent connection closed")

// ErrReset is the error of a command whose guest agent was started anew, or has
// ended the session.
var ErrReset = errors.New("guest agent ended the session")

// ErrDetached is what a server's stream returns from Read, once, when the host
// has gone. The next Read waits for the next host.
var ErrDetached = errors.New("host detached")

// Info is what a guest says of itself.
type Info struct {
	Hostname  string        `json:"hostname"`
	Addresses []netip.Addr  `json:"addresses,omitempty"` // neither loopback nor link-local
	Kernel    string        `json:"kernel"`
	Uptime    time.Duration `json:"uptime"`
	Ready     bool          `json:"ready"` // the root file system is there and its process was started
	Epoch     string        `json:"epoch"` // another one after each start of the agent
}

// EventKind is what an Event tells.
type EventKind string

// The kinds of event.
const (
	Ready   EventKind = "ready"   // set-up is done
	Address EventKind = "address" // Addresses changed
	Exited  EventKind = "exited"  // the main process ended with Code; the guest powers off
)

// Event is something that happened in the guest.
type Event struct {
	Kind      EventKind    `json:"kind"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Code      int          `json:"code,omitempty"`
}

// Command is a command to run in the guest.
type Command struct {
	Args []string          `json:"args"`
	Env  map[string]string `json:"env,omitempty"` // added to PATH, HOME, USER and TERM
	Dir  string            `json:"dir,omitempty"`
	User string            `json:"user,omitempty"` // name or id, and ":group"; empty is root
	TTY  bool              `json:"tty,omitempty"`
	// Main is the guest's own process, which waits to be asked for. Its end is the
	// guest's; it goes on when its host has gone. Only TTY, Rows, Cols and Env are
	// read then.
	Main bool   `json:"main,omitempty"`
	Rows uint16 `json:"rows,omitempty"`
	Cols uint16 `json:"cols,omitempty"`
}

// Error is what the guest's agent answered instead of doing what it was asked.
type Error struct {
	Code int // an exit code as a shell would give it: 127 not found, 126 not executable
	Text string
}

func (e *Error) Error() string { return e.Text }

// The messages inside frames, as JSON.
type (
	request struct {
		Op      string   `json:"op"` // info, exec, shutdown
		Command *Command `json:"command,omitempty"`
		Stdin   bool     `json:"stdin,omitempty"`
		Reboot  bool     `json:"reboot,omitempty"`
	}
	result struct {
		Code  int    `json:"code"`
		Error string `json:"error,omitempty"`
		Info  *Info  `json:"info,omitempty"`
	}
	control struct {
		Signal int    `json:"signal,omitempty"`
		Rows   uint16 `json:"rows,omitempty"`
		Cols   uint16 `json:"cols,omitempty"`
	}
	greeting struct {
		Version int    `json:"version"`
		Epoch   string `json:"epoch,omitempty"`
	}
	report struct {
		Seq   uint64 `json:"seq"`
		Event Event  `json:"event,omitzero"`
	}
)

const version = 1
