package flintlock

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/vmm"
	"ingot/internal/vmm/process"
)

// Driver takes over the hypervisors of one kind that flintlock has started. It can
// do with them what flintlock has left open: Firecracker was told to have no API, and
// neither has a console that anybody else can open.
type Driver struct {
	name  string
	found func(words []string, uid string) (socket string, ours bool) // by its command line
	log   *slog.Logger
}

var _ vmm.Driver = (*Driver)(nil)

// Drivers are those of both kinds.
func Drivers(log *slog.Logger) []vmm.Driver {
	return []vmm.Driver{
		&Driver{Firecracker, isFirecracker, log},
		&Driver{CloudHypervisor, isCloudHypervisor, log},
	}
}

// isFirecracker knows a command line by the uid that it gives.
func isFirecracker(words []string, uid string) (string, bool) {
	for i := range len(words) - 1 {
		if words[i] == "--id" && words[i+1] == uid {
			return "", true
		}
	}
	return "", false
}

// isCloudHypervisor knows a command line by its socket, in the directory of that uid.
func isCloudHypervisor(words []string, uid string) (socket string, ours bool) {
	for i := range len(words) - 1 {
		socket := strings.TrimPrefix(words[i+1], "path=")
		if words[i] == "--api-socket" && filepath.Base(filepath.Dir(socket)) == uid {
			return socket, true
		}
	}
	return "", false
}

// Name is firecracker or cloudhypervisor.
func (d *Driver) Name() string { return d.name }

// Facts says that the driver starts nothing.
func (d *Driver) Facts() vmm.Facts {
	return vmm.Facts{AttachOnly: true, Reason: "Ingot keeps what flintlock has started with " + d.name + ", and can't start it itself yet"}
}

// Features lists what the driver can do beyond the contract.
func (d *Driver) Features() []vmm.Feature {
	if d.name == CloudHypervisor {
		return []vmm.Feature{vmm.Macvtap, vmm.Virtiofs, vmm.Pause}
	}
	return nil
}

// Start is none of this driver's.
func (d *Driver) Start(context.Context, vmm.Config) (vmm.Machine, error) {
	return nil, fmt.Errorf("%s: %w", d.Facts().Reason, errdefs.ErrNotImplemented)
}

func (d *Driver) file(dir, kind string) string { return filepath.Join(dir, d.name+"."+kind) }

// Attach finds the hypervisor that flintlock has started in dir, which has the
// microVM's uid for a name. It is known by its words, not by a number alone.
func (d *Driver) Attach(_ context.Context, dir string) (vmm.Machine, error) {
	if !d.began(dir) {
		return nil, fmt.Errorf("%s was not started in %s: %w", d.name, dir, errdefs.ErrNotFound)
	}
	p, socket, err := d.find(dir)
	if errdefs.IsNotFound(err) {
		return nil, &vmm.Ended{Exit: d.conclude(dir, err)}
	}
	if err != nil {
		return nil, fmt.Errorf("attach to %s: %w", d.name, err)
	}
	os.Remove(filepath.Join(dir, endFile)) // flintlock, back for a while, has started it again
	return newMachine(d, dir, socket, p), nil
}

// began says whether flintlock has started something in dir.
func (d *Driver) began(dir string) bool {
	for _, kind := range []string{"pid", "stdout"} {
		if _, err := os.Stat(d.file(dir, kind)); err == nil {
			return true
		}
	}
	return false
}

// find opens the process: that of the number in flintlock's file, or if it is
// another's now, the one with the right words.
func (d *Driver) find(dir string) (p *process.Process, socket string, err error) {
	uid := filepath.Base(dir)
	ours := func(words []string) bool {
		at, ours := d.found(words, uid)
		if ours {
			socket = at
		}
		return ours
	}
	pid, err := readPID(d.file(dir, "pid"))
	if err == nil {
		p, err = hold(pid, ours)
	}
	if err == nil || !errdefs.IsNotFound(err) {
		return p, socket, err
	}
	reason := err
	all, err := process.List()
	if err != nil {
		return nil, "", err
	}
	for _, pid := range all {
		if words, err := process.Cmdline(pid); err != nil || !ours(words) {
			continue
		}
		other, err := hold(pid, ours)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil && p != nil { // one of them may only watch the other
			other.Close()
			err = fmt.Errorf("processes %d and %d both have the words of %s: %w", p.PID, pid, uid, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			if p != nil {
				p.Close()
			}
			return nil, "", err
		}
		p = other
	}
	if p == nil {
		return nil, "", reason
	}
	return p, socket, nil
}

// hold opens a process if its words are the right ones, else the error is an
// errdefs.ErrNotFound. Its start time, before and after they were read, says that
// they are those of the process that is held.
func hold(pid int, ours func(words []string) bool) (*process.Process, error) {
	p, err := process.Find(pid, 0)
	if err != nil {
		return nil, err
	}
	words, err := process.Cmdline(pid)
	if err == nil {
		var start uint64
		if start, err = process.StartTime(pid); err == nil && (start != p.Start || !ours(words)) {
			err = fmt.Errorf("process %d is another's: %w", pid, errdefs.ErrNotFound)
		}
	}
	if err == nil {
		return p, nil
	}
	p.Close()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		err = fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	return nil, err
}

// readPID reads a number as flintlock writes it.
func readPID(path string) (int, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%s is not there: %w", filepath.Base(path), errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	var pid int
	if _, err := fmt.Sscanf(string(text), "%d", &pid); err != nil || pid <= 0 {
		return 0, fmt.Errorf("%s holds no number: %w", filepath.Base(path), errdefs.ErrNotFound)
	}
	return pid, nil
}

// end is runtime.json once a hypervisor has ended: what every driver writes, as far
// as it matters then.
type end struct {
	Format int      `json:"format"`
	Driver string   `json:"driver"`
	UID    string   `json:"uid"`
	Exit   vmm.Exit `json:"exit"`
}

const (
	endFile   = "runtime.json"
	endFormat = 1
)

// conclude says how a microVM has ended that nobody watched, every time the same.
func (d *Driver) conclude(dir string, reason error) vmm.Exit {
	var e end
	text, err := os.ReadFile(filepath.Join(dir, endFile))
	if err == nil && json.Unmarshal(text, &e) == nil && e.Driver == d.name && e.Format == endFormat {
		return e.Exit
	}
	exit := vmm.Exit{Cause: vmm.Unknown, Detail: reason.Error(), At: time.Now()}
	d.note(dir, exit)
	return exit
}

// note puts an end on record.
func (d *Driver) note(dir string, exit vmm.Exit) {
	text, err := json.MarshalIndent(end{endFormat, d.name, filepath.Base(dir), exit}, "", "  ")
	path := filepath.Join(dir, endFile)
	if err == nil {
		err = os.WriteFile(path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		d.log.Warn("cannot record the end of a microVM", "uid", filepath.Base(dir), "err", err)
	}
}

// lastLine is the end of what a hypervisor has said.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	text := make([]byte, min(size, 4096))
	n, _ := f.ReadAt(text, size-int64(len(text)))
	lines := strings.Split(strings.TrimSpace(string(text[:n])), "\n")
	return lines[len(lines)-1]
}
