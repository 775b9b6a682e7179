package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/types"
	"ingot/internal/env"
)

func sshCommand() *cobra.Command {
	var plain bool
	cmd := &cobra.Command{
		Use:   "ssh [USER@]NAME [-- COMMAND…]",
		Short: "Log in to a microVM",
		Long: `Log in to a microVM by ssh, as root if no USER is given. There is nothing to set up: the
environment has a key, which the guest's agent puts in its place, and says which host
keys are the guest's. A guest without sshd, or out of reach, gets a shell by its agent. ` + naming,
		Example: `  ingot ssh web
  ingot ssh debian@web -- journalctl -b`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := commandAfter(cmd, args)
			if err != nil {
				return err
			}
			user, name, ok := strings.Cut(args[0], "@")
			if !ok {
				user, name = "root", args[0]
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), name)
				if err != nil {
					return err
				}
				if err := booted(cmd.Context(), vm); err != nil {
					return err
				}
				if !plain {
					err := c.ssh(cmd.Context(), vm, user, command)
					var no *noSSH
					if !errors.As(err, &no) {
						return err
					}
					fmt.Fprintf(os.Stderr, "ingot: %s: a shell by its agent\n", no.reason)
				}
				return agentShell(cmd.Context(), vm, user, command)
			})
		},
	}
	cmd.Flags().BoolVar(&plain, "agent", false, "by the agent, also where there is an sshd")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// noSSH is why a microVM is not reached by ssh.
type noSSH struct{ reason string }

func (n *noSSH) Error() string { return n.reason }

// agentShell runs a login shell, or a command as ssh would.
func agentShell(ctx context.Context, vm microVM, user string, command []string) error {
	start := &ingotv1.ExecStart{Uid: vm.uid(), Env: map[string]string{}, User: user, WorkingDir: "/", Stdin: true}
	if len(command) > 0 {
		start.Args = []string{"sh", "-c", strings.Join(command, " ")}
		return attach(ctx, vm, start)
	}
	start.Args = []string{"sh", "-c", `cd; if command -v bash >/dev/null; then exec bash -l; fi; exec sh -l`}
	start.Tty = isTerminal(os.Stdin) && isTerminal(os.Stdout)
	return attach(ctx, vm, start)
}

// Exit codes of guestKey, beside those of a shell.
const (
	noServer = 60 + iota
	noUser
	noAnswer
)

// guestKey is run in the guest as root: it waits until sshd listens, which it says
// on standard error if that is not at once, puts the key
// in its place before all others (one before it may be tied to a command), and
// prints the host keys.
const guestKey = `
user=$1 type=$2 blob=$3 comment=$4
listens() { cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -qi '^ *[0-9]*: [0-9A-F]*:0016 [0-9A-F]*:0000 0A'; }
if ! listens; then
	for p in sshd dropbear /usr/sbin/sshd; do command -v $p >/dev/null && found=$p; done
	[ -n "$found" ] || exit 60
	n=0
	while ! listens; do
		n=$((n+1)); [ $n -lt 120 ] || exit 62
		sleep 1
		[ $n -gt 1 ] || echo wait >&2
	done
fi
line=$(grep "^$user:" /etc/passwd) || exit 61
home=$(echo "$line" | cut -d: -f6) owner=$(echo "$line" | cut -d: -f3,4)
file=$home/.ssh/authorized_keys
umask 077
mkdir -p "$home/.ssh"
if [ "$(head -n 1 "$file" 2>/dev/null)" != "$type $blob $comment" ]; then
	{ echo "$type $blob $comment"; grep -vF "$blob" "$file" 2>/dev/null; } >"$file.ingot"
	mv "$file.ingot" "$file"
	chown "$owner" "$home/.ssh" "$file"
fi
cat /etc/ssh/ssh_host_*_key.pub 2>/dev/null
exit 0
`

// ssh becomes an ssh to the microVM. It returns only if that was not to be.
func (c *cloud) ssh(ctx context.Context, vm microVM, user string, command []string) error {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return &noSSH{"there is no ssh here (apt-get install openssh-client)"}
	}
	keys, err := openSSHKeys(ctx, c.name)
	if err != nil {
		return err
	}
	var hostKeys bytes.Buffer
	public := strings.Fields(keys.public)
	p := newProgress()
	code, err := ask(ctx, vm, &ingotv1.ExecStart{
		Uid: vm.uid(), User: "root", WorkingDir: "/", Env: map[string]string{},
		Args: append([]string{"sh", "-c", guestKey, "sh", user}, public...),
	}, &hostKeys, heard(func() { p.say("wait for the sshd of "+vm.String(), "") }))
	p.clear()
	if err != nil {
		return err
	}
	switch code {
	case 0:
	case noServer, 126, 127:
		return &noSSH{vm.String() + " has no sshd"}
	case noUser:
		return fmt.Errorf("log in to %s: user %s: %w", vm, user, errdefs.ErrNotFound)
	case noAnswer:
		return &noSSH{"the sshd of " + vm.String() + " does not listen"}
	default:
		return fmt.Errorf("log in to %s: the key cannot be put in its place (code %d)", vm, code)
	}
	// It may have had no address when it was found.
	if vm, err = c.find(ctx, vm.uid()); err != nil {
		return err
	}
	ip := address(vm.MicroVM, c.leases(ctx))
	if ip == "" { // which would mean this machine
		return &noSSH{vm.String() + " has no address"}
	}
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", net.JoinHostPort(ip, "22"))
	if err != nil {
		return &noSSH{fmt.Sprintf("%s cannot be reached from here (%v)", vm, err)}
	}
	conn.Close()
	argv := append([]string{"ssh"}, keys.options(vm.uid(), hostKeys.String())...)
	if hostKeys.Len() > 0 {
		if err := keys.trust(vm.uid(), hostKeys.String()); err != nil {
			return err
		}
	}
	argv = append(append(argv, user+"@"+ip), command...)
	if err := syscall.Exec(program, argv, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	return nil
}

// heard is told that there was output.
type heard func()

func (h heard) Write(p []byte) (int, error) {
	h()
	return len(p), nil
}

// ask runs a command in a guest for its output and code.
func ask(ctx context.Context, vm microVM, start *ingotv1.ExecStart, stdout, stderr io.Writer) (int, error) {
	code, err := newRemote(vm, start).run(ctx, stdout, stderr)
	if err != nil {
		return 0, fmt.Errorf("ask the agent of %s: %w", vm, err)
	}
	return code, nil
}

// sshKeys are an environment's: its own, and those of its microVMs.
type sshKeys struct {
	dir    string
	public string // a line of authorized_keys
}

const privateKey, knownHosts = "id_ed25519", "known_hosts"

// openSSHKeys makes the environment's key if there is none.
func openSSHKeys(ctx context.Context, name string) (sshKeys, error) {
	e, err := env.Open(name)
	if err != nil {
		return sshKeys{}, err
	}
	k := sshKeys{dir: filepath.Join(e.Dir(), "ssh")}
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return sshKeys{}, fmt.Errorf("make the environment's ssh key: %w", err)
	}
	path := filepath.Join(k.dir, privateKey)
	text, err := os.ReadFile(path + ".pub")
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeSSHKey(ctx, path, "ingot-"+name); err == nil {
			text, err = os.ReadFile(path + ".pub")
		}
	}
	if err != nil {
		return sshKeys{}, fmt.Errorf("make the environment's ssh key: %w", err)
	}
	k.public = strings.TrimSpace(string(text))
	if len(strings.Fields(k.public)) != 3 {
		return sshKeys{}, fmt.Errorf("read %s.pub: it is no public key: %w", path, errdefs.ErrInvalidArgument)
	}
	return k, nil
}

// addKey has cloud-init let the environment's key in. A microVM goes without
// where there is no ssh-keygen; `ingot ssh` has another way then.
func (c *cloud) addKey(ctx context.Context, spec *types.MicroVMSpec) error {
	const metaData = "meta-data"
	if _, ok := spec.GetMetadata()[metaData]; ok {
		return nil // the user's own
	}
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		return nil
	}
	keys, err := openSSHKeys(ctx, c.name)
	if err != nil {
		return err
	}
	if spec.Metadata == nil {
		spec.Metadata = map[string]string{}
	}
	spec.Metadata[metaData] = base64.StdEncoding.EncodeToString([]byte("public-keys:\n- " + keys.public + "\n"))
	return nil
}

// makeSSHKey makes a key aside and puts both its files in their places, the
// public one last: who sees that has both. Of two that are made at the same
// time one wins.
func makeSSHKey(ctx context.Context, path, comment string) error {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, privateKey)
	if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", made).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w: %s", err, bytes.TrimSpace(out))
	}
	if err := os.Link(made, path); err != nil {
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		// The winner's, or one whose maker was killed: its public half follows from it.
		out, err := exec.CommandContext(ctx, "ssh-keygen", "-y", "-f", path).Output()
		if err != nil {
			return fmt.Errorf("ssh-keygen -y: %w", err)
		}
		if err := os.WriteFile(made+".pub", out, 0o600); err != nil {
			return err
		}
	}
	return os.Rename(made+".pub", path+".pub")
}

// options are ssh's, for a guest whose host keys are known from its agent.
func (k sshKeys) options(uid, hostKeys string) []string {
	check := "yes"
	if hostKeys == "" {
		check = "accept-new"
	}
	return []string{
		"-i", filepath.Join(k.dir, privateKey), "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR",
		"-o", "UserKnownHostsFile=" + filepath.Join(k.dir, knownHosts), "-o", "GlobalKnownHostsFile=/dev/null",
		"-o", "HostKeyAlias=" + uid, "-o", "StrictHostKeyChecking=" + check, "-o", "UpdateHostKeys=no",
	}
}

// knownMicroVMs bounds the file of host keys: microVMs come and go, and each is
// asked for its keys at each login.
const knownMicroVMs = 256

// trust notes a microVM's host keys in the place of those that it had.
func (k sshKeys) trust(uid, hostKeys string) error {
	path := filepath.Join(k.dir, knownHosts)
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("note host keys: %w", err)
	}
	var lines []string
	for line := range strings.Lines(string(old)) {
		if !strings.HasPrefix(line, uid+" ") {
			lines = append(lines, line)
		}
	}
	lines = lines[max(0, len(lines)-knownMicroVMs):]
	for line := range strings.Lines(hostKeys) {
		if f := strings.Fields(line); len(f) >= 2 {
			lines = append(lines, fmt.Sprintf("%s %s %s\n", uid, f[0], f[1]))
		}
	}
	temporary, err := os.CreateTemp(k.dir, ".known-*")
	if err == nil {
		_, err = temporary.WriteString(strings.Join(lines, ""))
		if err = errors.Join(err, temporary.Close()); err == nil {
			err = os.Rename(temporary.Name(), path)
		}
	}
	if err != nil {
		return fmt.Errorf("note host keys: %w", err)
	}
	return nil
}
