package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const moduleList = "/modules/list"

// lastAwaited is the last module on the list that the way to a running image
// needs. The rest is loaded while that runs.
const lastAwaited = "virtio_console"

// loadModules loads the drivers in the order of the initramfs's list, and tells
// each one's name as it is there, so that what needs it may begin. It returns
// those that can wait. The files go: the initramfs is the guest's memory.
func loadModules(loaded func(name string)) (lateModules, error) {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		return nil, fmt.Errorf("read the list of modules: %w", err)
	}
	files := strings.Fields(string(list))
	var late lateModules
	for i, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("load a module: %w", err)
		}
		if late != nil {
			late = append(late, f)
			continue
		}
		if err := loadModule(f); err != nil {
			return nil, err
		}
		name := strings.TrimSuffix(path.Base(file), ".ko")
		loaded(name)
		if name == lastAwaited {
			late = make(lateModules, 0, len(files)-i)
		}
	}
	return late, os.RemoveAll("/modules")
}

// lateModules are open, since their names end with the initramfs.
type lateModules []*os.File

func (l lateModules) load() {
	for _, f := range l {
		report(loadModule(f))
	}
}

// loadModule loads a module and closes its file.
func loadModule(f *os.File) error {
	defer f.Close()
	err := unix.FinitModule(int(f.Fd()), "", 0)
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil // ENODEV: a driver that will not stay without its device
	}
	return fmt.Errorf("load %s: %w", f.Name(), err)
}
