package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
)

// boot is PID 1's life.
func boot() error {
	if err := mountFirst(); err != nil {
		return err
	}
	openConsole()
	o, err := readOptions()
	if err != nil {
		return err
	}
	if o.hostname != "" {
		report(syscall.Sethostname([]byte(o.hostname)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// The answers of the network and of the disk are waited for while the other
	// drivers are being loaded.
	var net *network
	root := make(chan error, 1)
	startRoot := sync.OnceFunc(func() {
		go func() { root <- mountRoot(ctx, o) }() // waited for below
	})
	late, err := loadModules(func(name string) {
		switch name {
		case "virtio_net":
			net = startNetwork(ctx, o)
		case "virtio_blk":
			startRoot()
		}
	})
	if err != nil {
		return err
	}
	if net == nil {
		net = startNetwork(ctx, o) // a kernel with the drivers built in
	}
	startRoot()
	if err := <-root; err != nil {
		return err
	}
	if i, ok := findInit(newRoot); ok {
		late.load() // an image without modules of its own has no other chance
		return handOver(o, net, i)
	}
	return stay(ctx, o, net, late)
}

// openConsole points the standard streams at the console, which the kernel
// could not open for an initramfs that has no /dev/console.
func openConsole() {
	f, err := os.OpenFile("/dev/console", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return // there is none: words go nowhere
	}
	for fd := range 3 {
		syscall.Dup3(int(f.Fd()), fd, 0)
	}
}

// stay is a boot of an image without an init: this process goes on as PID 1.
func stay(ctx context.Context, o options, net *network, late lateModules) error {
	if err := switchRoot(); err != nil {
		return err
	}
	mountRest(o.mounts)
	writeNames("", o.hostname)
	net.useRoot("/etc")
	return newMachine(o).run(ctx, late)
}

// writeNames writes what says the guest's name, under root. A read-only root
// keeps what it has.
func writeNames(root, hostname string) {
	if hostname == "" {
		return
	}
	if err := os.MkdirAll(root+"/etc", 0o755); err != nil {
		return
	}
	quiet := func(err error) {
		if err != nil && !isReadOnly(err) {
			say("%v", err)
		}
	}
	quiet(replace(root+"/etc/hostname", hostname+"\n"))
	if _, err := os.Stat(root + "/etc/hosts"); os.IsNotExist(err) {
		quiet(replace(root+"/etc/hosts", fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n", hostname)))
	}
}
