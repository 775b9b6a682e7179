// Command guest is the first and only program of the suite's guests. It does
// what it is told on the serial console, a line each:
//
//	echo WORD  answers "echoed WORD"
//	list       answers "disks …", serial numbers in order, and "nics …", MAC addresses in order
//	poweroff   and reboot and panic do so
//
// It sends back what comes from the agent's channel, and powers off when its
// power button is pressed.
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		os.MkdirAll(m[1], 0o755)
		unix.Mount(m[0], m[1], m[0], 0, "")
	}
	list, _ := os.ReadFile("/modules/list")
	for path := range strings.FieldsSeq(string(list)) {
		if f, err := os.Open(path); err == nil {
			unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
	}
	console, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
	if err != nil {
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	raw(console)
	go sendBack()
	go listenToButton()
	fmt.Fprintf(console, "\nguest ready\n")
	for lines := bufio.NewScanner(console); lines.Scan(); {
		do(console, strings.Fields(lines.Text()))
	}
	select {}
}

// raw switches the terminal's own echo off.
func raw(f *os.File) {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return
	}
	t.Lflag &^= unix.ECHO
	unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

func do(console io.Writer, words []string) {
	if len(words) == 0 {
		return
	}
	switch words[0] {
	case "echo":
		fmt.Fprintf(console, "echoed %s\n", strings.Join(words[1:], " "))
	case "list":
		fmt.Fprintf(console, "disks %s\n", contents("/sys/block/vd*/serial"))
		fmt.Fprintf(console, "nics %s\n", contents("/sys/class/net/eth*/address"))
	case "poweroff":
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
}

func contents(pattern string) string {
	var all []string
	files, _ := filepath.Glob(pattern)
	for _, f := range files {
		b, _ := os.ReadFile(f)
		all = append(all, strings.TrimSpace(string(b)))
	}
	return strings.Join(all, " ")
}

// sendBack is the agent.
func sendBack() {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if b, _ := os.ReadFile(n); strings.TrimSpace(string(b)) != "org.ingot.agent.0" {
				continue
			}
			if f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0); err == nil {
				buf := make([]byte, 4096)
				for {
					n, err := f.Read(buf)
					if n > 0 {
						f.Write(buf[:n])
					}
					if err != nil {
						time.Sleep(5 * time.Millisecond) // nobody is connected
					}
				}
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// listenToButton waits for KEY_POWER.
func listenToButton() {
	var files []string
	for len(files) == 0 {
		files, _ = filepath.Glob("/dev/input/event*")
		time.Sleep(5 * time.Millisecond)
	}
	f, err := os.Open(files[0])
	if err != nil {
		return
	}
	const keyPower = 116
	for event := make([]byte, 24); ; {
		if _, err := io.ReadFull(f, event); err != nil {
			return
		}
		if binary.LittleEndian.Uint16(event[18:]) == keyPower {
			unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
	}
}
