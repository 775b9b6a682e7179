package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// strangers are the listeners on a machine's ports that are none of its roles.
func (m Machine) strangers() ([]string, error) {
	sockets := map[string]Port{} // by inode
	err := m.Inside(func() error {
		for _, protocol := range []string{"tcp", "udp"} {
			for _, version := range []string{"", "6"} {
				for inode, number := range listening(read("/proc/thread-self/net/"+protocol+version), protocol) {
					port := Port{protocol, number}
					if slices.Contains(m.Ports, port) {
						sockets[inode] = port
					}
				}
			}
		}
		return nil
	})
	if err != nil || len(sockets) == 0 {
		return nil, err
	}
	var found []string
	for inode, pids := range holders(sockets) {
		for _, pid := range pids {
			// A role that ends meanwhile leaves a socket that nobody has any more.
			argv := arguments(pid)
			if len(argv) > 0 && !m.isRole(argv) {
				port := sockets[inode]
				found = append(found, fmt.Sprintf("port %d/%s of %s is held by %s (pid %d)", port.Number, port.Protocol, m.Name, filepath.Base(argv[0]), pid))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}

// The states of a socket that listens, in /proc/net (include/net/tcp_states.h).
var listens = map[string]string{"tcp": "0A", "udp": "07"}

// listening are the ports of a table in /proc/net, by the socket's inode.
func listening(table, protocol string) map[string]uint16 {
	ports := map[string]uint16{}
	for line := range strings.Lines(table) {
		// sl local_address rem_address st queues timer retransmits uid timeout inode
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[3] != listens[protocol] {
			continue
		}
		_, port, _ := strings.Cut(fields[1], ":")
		if n, err := strconv.ParseUint(port, 16, 16); err == nil {
			ports[fields[9]] = uint16(n)
		}
	}
	return ports
}

// holders are the processes that have a socket open, each socket's.
func holders(sockets map[string]Port) map[string][]int {
	by := map[string][]int{}
	for inode := range sockets {
		by[inode] = nil
	}
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		target, _ := os.Readlink(file)
		inode, ok := strings.CutPrefix(target, "socket:[")
		inode = strings.TrimSuffix(inode, "]")
		if _, asked := sockets[inode]; !ok || !asked {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(file, "/")[2]); err == nil {
			by[inode] = append(by[inode], pid)
		}
	}
	return by
}

// isRole says whether a process with these arguments is one of the machine's roles.
// Its file may be an older program's, of another name, and its number may not be
// noted yet.
func (m Machine) isRole(argv []string) bool {
	return slices.ContainsFunc(m.Roles, func(args []string) bool { return slices.Equal(args, argv[1:]) })
}

// arguments are those of a process, none if it has ended.
func arguments(pid int) []string {
	text := read(fmt.Sprintf("/proc/%d/cmdline", pid))
	if text == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text, "\x00"), "\x00")
}
