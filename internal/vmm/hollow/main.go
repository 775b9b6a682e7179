// Command hollow is a hypervisor with nothing inside: it takes QEMU's command
// line and speaks its machine protocol as the QEMU driver uses them, and plays
// the guest itself. It stands in where a thousand microVMs are wanted, or one
// that starts in milliseconds, and passes the suite of package vmmtest. It emulates no CPU,
// reads no disk and sends no packet.
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if slices.Contains(os.Args, "--version") {
		fmt.Println("QEMU emulator version 0.0.0 (hollow)")
		return
	}
	m, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "hollow:", err)
		os.Exit(1)
	}
	m.run()
}

// options is a command line as far as it matters.
type options struct {
	qmp, console, agent int      // listening sockets; 0: none
	log                 *os.File // what the console shows
	echo                bool
	deaf                bool           // the guest does not shut down when it is asked to
	rigid               bool           // disks do not grow while it runs
	delay               time.Duration  // until the monitor answers
	slow                time.Duration  // until the guest has shut down
	reboot              time.Duration  // after which the guest restarts; 0: it does not
	disks, nics         []string       // serial numbers, MAC addresses
	sets                map[string]int // descriptors of files, by the number of their set
	nodes               []node         // the disks again
}

// node is a disk as the monitor speaks of it.
type node struct {
	name string
	fd   int
	size int64 // as the guest sees it
}

// parse reads the command line, and refuses what QEMU would.
func parse(args []string) (*machine, error) {
	m := &machine{options: options{sets: map[string]int{}}}
	var problems []error
	for i := 0; i+1 < len(args); i++ {
		if err := m.option(args[i], args[i+1]); err != nil {
			problems = append(problems, fmt.Errorf("%s %s: %w", args[i], args[i+1], err))
		}
	}
	return m, errors.Join(problems...)
}

func (m *machine) option(name, value string) error {
	switch name {
	case "-kernel":
		return isKernel(value)
	case "-m":
		n, err := strconv.Atoi(strings.TrimSuffix(value, "M"))
		if err == nil && n > 1<<20 {
			err = errors.New("cannot allocate memory")
		}
		return err
	case "-smp":
		n, err := strconv.Atoi(value)
		if err == nil && n > 255 {
			err = errors.New("too many CPUs")
		}
		return err
	case "-append":
		for word := range strings.FieldsSeq(value) {
			// The suite's guest sends back what its agent's channel gets.
			if word == "hollow.agent=echo" {
				m.echo = true
			}
			if word == "hollow.deaf=1" {
				m.deaf = true
			}
			if word == "hollow.rigid=1" {
				m.rigid = true
			}
			for name, d := range map[string]*time.Duration{"hollow.delay": &m.delay, "hollow.slow": &m.slow, "hollow.reboot": &m.reboot} {
				if text, ok := strings.CutPrefix(word, name+"="); ok {
					var err error
					if *d, err = time.ParseDuration(text); err != nil {
						return err
					}
				}
			}
		}
	case "-add-fd":
		if field(value, "opaque") == "console" {
			m.log = os.NewFile(uintptr(number(value, "fd")), "console")
		}
		m.sets[field(value, "set")] = number(value, "fd")
	case "-blockdev":
		n := node{name: field(value, "node-name"), fd: m.sets[strings.TrimPrefix(field(value, "file.filename"), "/dev/fdset/")]}
		var stat unix.Stat_t
		err := unix.Fstat(n.fd, &stat)
		n.size = stat.Size
		m.nodes = append(m.nodes, n)
		return err
	case "-chardev":
		switch field(value, "id") {
		case "qmp":
			m.qmp = number(value, "fd")
		case "console":
			m.console = number(value, "fd")
		case "agent":
			m.agent = number(value, "fd")
		}
	case "-device":
		if strings.HasPrefix(value, "virtio-blk-device") {
			m.disks = append(m.disks, field(value, "serial"))
		}
		if strings.HasPrefix(value, "virtio-net-device") {
			m.nics = append(m.nics, field(value, "mac"))
		}
	case "-netdev":
		return isTap(number(value, "fd"))
	}
	return nil
}

// field is one of an option's comma-separated values.
func field(options, name string) string {
	for f := range strings.SplitSeq(options, ",") {
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return ""
}

func number(options, name string) int {
	n, err := strconv.Atoi(field(options, name))
	if err != nil {
		return -1
	}
	return n
}

func isKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := f.Read(magic); err != nil || string(magic) != "\x7fELF" {
		return errors.New("not a kernel")
	}
	return nil
}

func isTap(fd int) error {
	_, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	return err
}
