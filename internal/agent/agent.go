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

// ErrUnknown is the error of a lasting command that the guest does not know, or no
// longer.
var ErrUnknown = errors.New("the guest knows of no such command: it has not started, or has ended")

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
	// ID makes it a lasting command, which another conversation can take up under
	// this name: what it writes is kept until it is confirmed, at most a window of
	// each output, and so is its end. It waits for a host for some minutes, and is
	// then hung up on. An ID is never given twice.
	ID string `json:"id,omitempty"`
	// Port, of Dial, is joined instead of a program's streams; all else is empty.
	Port uint16 `json:"port,omitempty"`
}

// Resumption is where a lasting command is taken up: what had come from it.
type Resumption struct {
	Stdout uint64 `json:"stdout"` // bytes since its start
	Stderr uint64 `json:"stderr"`
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
		Op      string   `json:"op"` // info, exec, dial, shutdown
		Command *Command `json:"command,omitempty"`
		Stdin   bool     `json:"stdin,omitempty"`
		Reboot  bool     `json:"reboot,omitempty"`
		// Resume takes a lasting command up that was started before, and starts none.
		Resume *Resumption `json:"resume,omitempty"`
	}
	result struct {
		Code    int    `json:"code"`
		Error   string `json:"error,omitempty"`
		Unknown bool   `json:"unknown,omitempty"` // ErrUnknown
		Info    *Info  `json:"info,omitempty"`
	}
	joined struct {
		Stdin uint64 `json:"stdin"` // bytes that had come for the command
		Room  int    `json:"room"`  // how many more may come
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

// version is the conversation's. From 2 on a guest knows lasting commands.
const version = 2
