// Command guest is the first and only program of the suite's guests. It does
// what it is told on the serial console, a line each:
//
//	echo WORD  answers "echoed WORD"
//	list       answers "disks …", serial numbers in order, and "nics …", MAC addresses in order
//	sizes      answers "sizes …", the disks' in bytes, in order
//	mark ID W  writes W at the end of the disk with that serial number, and answers "marked <nil>"
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
	"strconv"
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
	case "sizes":
		var sizes []string
		for sectors := range strings.FieldsSeq(contents("/sys/block/vd*/size")) {
			n, _ := strconv.ParseInt(sectors, 10, 64)
			sizes = append(sizes, strconv.FormatInt(n*512, 10))
		}
		fmt.Fprintf(console, "sizes %s\n", strings.Join(sizes, " "))
	case "mark":
		fmt.Fprintln(console, "marked", mark(words[1], words[2]))
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

// mark writes a word to the last bytes of a disk.
func mark(serial, word string) error {
	files, _ := filepath.Glob("/sys/block/vd*/serial")
	for _, file := range files {
		if b, _ := os.ReadFile(file); strings.TrimSpace(string(b)) != serial {
			continue
		}
		f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_WRONLY|os.O_SYNC, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Seek(-int64(len(word)), io.SeekEnd); err != nil {
			return err
		}
		_, err = f.WriteString(word)
		return err
	}
	return os.ErrNotExist
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
