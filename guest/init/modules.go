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

// loadModules loads the drivers in the order of the initramfs's list, and tells
// each one's name as it is there, so that what needs it may begin. The files
// go: the initramfs is the guest's memory.
func loadModules(loaded func(name string)) error {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		return fmt.Errorf("read the list of modules: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		file := strings.TrimSpace(line)
		if err := loadModule(file); err != nil {
			return fmt.Errorf("load %s: %w", file, err)
		}
		os.Remove(file)
		loaded(strings.TrimSuffix(path.Base(file), ".ko"))
	}
	return os.RemoveAll("/modules")
}

func loadModule(file string) error {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.FinitModule(fd, "", 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil // there already; or a driver that will not stay without its device
	}
	return err
}
