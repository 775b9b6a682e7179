package agent

import (
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// account is who runs a command. The guest's files say who that is; os/user
// would remember the answers for the process's life.
type account struct {
	name   string
	home   string
	uid    uint32
	gid    uint32
	groups []uint32
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookup finds "user", "uid", "user:group" or "uid:gid"; empty is root.
func lookup(spec string) (account, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	if name == "" {
		name = "0"
	}
	a := account{name: name, home: "/"}
	number, numberErr := strconv.ParseUint(name, 10, 32)
	found := entry("/etc/passwd", 7, func(f []string) bool { return f[0] == name || f[2] == name })
	switch {
	case found != nil:
		uid, err1 := strconv.ParseUint(found[2], 10, 32)
		gid, err2 := strconv.ParseUint(found[3], 10, 32)
		if err1 != nil || err2 != nil {
			return account{}, &Error{Code: 126, Text: "user " + name + ": bad line in /etc/passwd"}
		}
		a.name, a.uid, a.gid, a.home = found[0], uint32(uid), uint32(gid), found[5]
	case numberErr == nil:
		a.uid, a.gid = uint32(number), uint32(number)
		if number == 0 {
			a.name, a.home = "root", "/root"
		}
	case name == "root":
		a.home = "/root"
	default:
		return account{}, &Error{Code: 126, Text: "user " + name + ": not found in the guest"}
	}
	if hasGroup {
		gid, err := groupID(group)
		if err != nil {
			return account{}, err
		}
		a.gid = gid
		return a, nil
	}
	a.groups = memberships(a.name)
	return a, nil
}

func groupID(group string) (uint32, error) {
	if f := entry("/etc/group", 3, func(f []string) bool { return f[0] == group }); f != nil {
		group = f[2]
	}
	gid, err := strconv.ParseUint(group, 10, 32)
	if err != nil {
		return 0, &Error{Code: 126, Text: "group " + group + ": not found in the guest"}
	}
	return uint32(gid), nil
}

func memberships(user string) []uint32 {
	var groups []uint32
	entry("/etc/group", 4, func(f []string) bool {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && slices.Contains(strings.Split(f[3], ","), user) {
			groups = append(groups, uint32(gid))
		}
		return false
	})
	return groups
}

// entry returns the first line of a colon-separated file that has enough fields
// and matches.
func entry(file string, fields int, match func([]string) bool) []string {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil // an image need not have one
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) >= fields && match(f) {
			return f
		}
	}
	return nil
}

func (a account) credential() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil // not a guest: a test without root
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// own gives the command's streams to its user, who then opens /dev/stdout as
// root does. What a user cannot own (/dev/null) is everybody's.
func (a account) own(files [3]*os.File) {
	if a.uid == 0 || os.Geteuid() != 0 {
		return
	}
	for _, f := range files {
		if i, err := f.Stat(); err == nil && (i.Mode()&os.ModeNamedPipe != 0 || isTerminal(f)) {
			f.Chown(int(a.uid), -1)
		}
	}
}

func isTerminal(f *os.File) bool {
	var t syscall.Termios
	return ioctl(int(f.Fd()), syscall.TCGETS, unsafe.Pointer(&t)) == nil
}

// environment is the command's: what a login would have set, then its own.
func (a account) environment(cmd Command) map[string]string {
	env := map[string]string{"PATH": defaultPath, "HOME": a.home, "USER": a.name}
	if cmd.TTY {
		env["TERM"] = "xterm"
	}
	maps.Copy(env, cmd.Env)
	return env
}
