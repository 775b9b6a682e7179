package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"ingot/internal/vmm"
)

// agentPort is the name of the agent's virtio-serial port in the guest.
const agentPort = "org.ingot.agent.0"

// maxSerial is how long a virtio disk's serial number may be.
const maxSerial = 20

// handover is the numbers, in the new process, of the files that it is given.
type handover struct {
	kernel, initrd         int // 0: there is none
	console                int // the log of the serial console
	qmp, serial, agent     int // listening sockets
	disks, nics            []int
	blockDisks             []bool // which disks are block devices, not files
	consoleSet, diskSetOne int    // QEMU's numbers of sets of files
}

// argv is QEMU's command line, without the program.
func (d *Driver) argv(c vmm.Config, h handover) []string {
	machine, accel, cpu := d.machine()
	args := []string{
		"-name", c.UID, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", machine, "-accel", accel, "-cpu", cpu,
		"-m", fmt.Sprintf("%dM", c.Memory), "-smp", strconv.Itoa(max(c.VCPU, 1)),
		"-kernel", fdPath(h.kernel),
	}
	if h.initrd != 0 {
		args = append(args, "-initrd", fdPath(h.initrd))
	}
	args = append(args, "-append", strings.Join(append(d.words(), c.Cmdline...), " "),
		// Two monitors: one for whoever is connected, and one whose events go to
		// a file also while nobody is.
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", h.qmp), "-mon", "chardev=qmp,mode=control",
		"-chardev", "stdio,id=events,signal=off", "-mon", "chardev=events,mode=control",
		"-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=console", h.console, h.consoleSet),
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off,logfile=/dev/fdset/%d,logappend=on", h.serial, h.consoleSet),
		"-serial", "chardev:console",
		"-device", "pvpanic",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng")
	if c.Agent {
		args = append(args, "-device", "virtio-serial-device",
			"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", h.agent),
			"-device", "virtserialport,chardev=agent,name="+agentPort)
	}
	for i, disk := range c.Disks {
		args = append(args, diskArgs(i, disk, h)...)
	}
	for i, nic := range c.NICs {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net%d,fd=%d,vhost=off", i, h.nics[i]),
			"-device", fmt.Sprintf("virtio-net-device,netdev=net%d,mac=%s", i, nic.MAC))
	}
	return args
}

func diskArgs(i int, disk vmm.Disk, h handover) []string {
	set := h.diskSetOne + i
	driver := "file"
	if h.blockDisks[i] {
		driver = "host_device"
	}
	node := fmt.Sprintf("driver=raw,node-name=%s,discard=unmap,file.driver=%s,file.filename=/dev/fdset/%d", nodeName(i), driver, set)
	if disk.ReadOnly {
		node += ",read-only=on"
	}
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", h.disks[i], set),
		"-blockdev", node,
		"-device", fmt.Sprintf("virtio-blk-device,drive=%s,serial=%s", nodeName(i), serial(disk.ID)),
	}
}

// nodeName is QEMU's own name of a disk, by its place.
func nodeName(disk int) string { return fmt.Sprintf("disk%d", disk) }

// serial is a disk's id as far as it fits; a comma would end it.
func serial(id string) string {
	id = strings.Map(func(r rune) rune {
		if r <= ' ' || r == ',' || r > '~' {
			return '-'
		}
		return r
	}, id)
	return id[:min(len(id), maxSerial)]
}

// fdPath names an open file to a program that insists on a path.
func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// machine is what -M, -accel and -cpu get. The accelerators are never given as a
// list to fall back along: where KVM emulates instructions, it starts well.
func (d *Driver) machine() (machine, accel, cpu string) {
	const base = "microvm,acpi=on,pcie=off,isa-serial=on,dump-guest-core=off,mem-merge=on"
	if d.KVM.Usable {
		return base + ",pit=off,pic=off,rtc=on", "kvm", "host"
	}
	// Without kvm-clock a guest needs the old timers.
	return base + ",pit=on,pic=on,rtc=on", fmt.Sprintf("tcg,thread=multi,tb-size=%d", d.TBSize), "max"
}

// words are the driver's own on the kernel's command line.
func (d *Driver) words() []string {
	words := []string{"console=ttyS0", "reboot=t"}
	if d.KVM.Usable || d.KVM.TSCkHz == 0 {
		return words
	}
	// A microvm has no HPET and no ACPI timer, and under TCG no kvm-clock: a
	// guest that measures its TSC by the PIT fails at random, and then hangs. TCG
	// shows it this machine's TSC, so it can be told. With it known, the kernel
	// also skips the calibration of its delay loop.
	return append(words, fmt.Sprintf("tsc_early_khz=%d", d.KVM.TSCkHz), "tsc=reliable", "no_timer_check")
}

// isBlock says whether a disk is a block device.
func isBlock(f *os.File) (bool, error) {
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	const charBit = os.ModeCharDevice
	return info.Mode()&os.ModeDevice != 0 && info.Mode()&charBit == 0, nil
}
