package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracer is a program of its own, `tracer PID STEP VICTIM`: it follows a
// process from system call to system call, counts those that change the world,
// and before the one of that number sends SIGKILL to the victim, which may be
// another process. It prints "armed", then "killed before" what. With a STEP of 0
// it kills nothing and prints the name of each.
func tracer() {
	runtime.LockOSThread() // ptrace(2) is a thread's affair
	number := func(i int) int {
		n, err := strconv.Atoi(os.Args[i])
		if err != nil {
			panic(err)
		}
		return n
	}
	if err := trace(number(1), number(2), number(3)); err != nil {
		fmt.Fprintln(os.Stderr, "tracer:", err)
		os.Exit(1)
	}
}

// startTracer starts one, and returns what it prints once it follows the process.
func startTracer(t testing.TB, pid, step, victim int) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	c := exec.Command("tracer", fmt.Sprint(pid), fmt.Sprint(step), fmt.Sprint(victim))
	var problems strings.Builder
	c.Stderr = &problems
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "armed" {
		t.Fatalf("tracer: %q %s", lines.Text(), problems.String())
	}
	return c, lines
}

func trace(pid, step, victim int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return err
	}
	for _, task := range tasks {
		tid, _ := strconv.Atoi(filepath.Base(task))
		const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE // threads, not child processes
		if err := ptrace(unix.PTRACE_SEIZE, tid, 0, options); err != nil {
			return fmt.Errorf("seize %d: %w", tid, err)
		}
		if err := ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0); err != nil {
			return err
		}
	}
	stopped := 0
	for steps := 0; ; {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ECHILD) {
			return nil // all have ended
		}
		if err != nil {
			return err
		}
		if !status.Stopped() {
			continue
		}
		if stopped++; stopped == len(tasks) {
			fmt.Println("armed")
		}
		signal := 0
		switch {
		case status.StopSignal() == unix.SIGTRAP|0x80:
			if name := change(tid); name != "" {
				if steps++; step == 0 {
					fmt.Println(name)
				} else if steps == step {
					fmt.Println("killed before", name) // first: it may itself be killed after the kill
					if err := unix.Kill(victim, unix.SIGKILL); err != nil {
						return err
					}
				}
			}
		case int(status)>>16 == 0: // no event of ptrace's, but a signal
			signal = int(status.StopSignal())
		}
		ptrace(unix.PTRACE_SYSCALL, tid, 0, signal) // it may be gone
	}
}

func ptrace(request, tid, addr, data int) error {
	if _, _, err := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), uintptr(addr), uintptr(data), 0, 0); err != 0 {
		return err
	}
	return nil
}

// changes are the system calls that change something outside of the process.
var changes = map[uint64]string{
	unix.SYS_MKDIRAT: "mkdirat", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2",
	unix.SYS_LINKAT: "linkat", unix.SYS_SYMLINKAT: "symlinkat", unix.SYS_FCHMODAT: "fchmodat", unix.SYS_FCHOWNAT: "fchownat",
	unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync", unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_FLOCK: "flock", unix.SYS_PWRITE64: "pwrite64",
	unix.SYS_SENDTO: "sendto", unix.SYS_SENDMSG: "sendmsg", unix.SYS_SENDMMSG: "sendmmsg", unix.SYS_CONNECT: "connect", unix.SYS_BIND: "bind", unix.SYS_LISTEN: "listen",
	unix.SYS_MOUNT: "mount", unix.SYS_UMOUNT2: "umount2", unix.SYS_KILL: "kill", unix.SYS_PIDFD_SEND_SIGNAL: "pidfd_send_signal",
	unix.SYS_IOCTL: "ioctl", unix.SYS_OPENAT: "openat", unix.SYS_WRITE: "write", unix.SYS_CLONE: "clone", unix.SYS_CLONE3: "clone3",
	unix.SYS_WAIT4: "wait4", unix.SYS_WAITID: "waitid",
}

// rename is rename(2), which only amd64 has.
const rename = 82

// change names the call that a thread is about to make, if it counts.
func change(tid int) string {
	var info struct { // struct ptrace_syscall_info
		op   uint8
		_    [3]byte
		arch uint32
		_, _ uint64 // instruction and stack pointer
		call uint64
		args [6]uint64
		_, _ uint64
	}
	const getSyscallInfo, entry = 0x420e, 1
	_, _, err := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if err != 0 || info.op != entry {
		return ""
	}
	switch {
	case info.call == unix.SYS_OPENAT && info.args[2]&unix.O_CREAT == 0,
		info.call == unix.SYS_WRITE && info.args[0] <= 2, // the log
		info.call == unix.SYS_CLONE && info.args[0]&unix.CLONE_THREAD != 0:
		return ""
	}
	if runtime.GOARCH == "amd64" && info.call == rename {
		return "rename"
	}
	return changes[info.call]
}
