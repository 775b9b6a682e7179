package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// options are what the kernel's command line says.
type options struct {
	hostname  string
	root      string
	rootType  string
	rootFlags string
	readOnly  bool
	process   process
	powerOff  string // off or reboot: what ends the hypervisor
	nic       string // the interface that asks for an address
	seeded    bool   // cloud-init is told where its data is
	network   string // flintlock's network configuration, decoded
	mounts    []mount
}

// process is what runs in an image without an init.
type process struct {
	Args       []string          `json:"args"`
	Env        map[string]string `json:"env"`
	Dir        string            `json:"dir"`
	User       string            `json:"user"`
	StopSignal string            `json:"stop_signal"`
	Attach     bool              `json:"attach"` // it waits until a host asks for it
}

type mount struct {
	device, path string
	readOnly     bool
}

func readOptions() (options, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return options{}, fmt.Errorf("read the kernel's command line: %w", err)
	}
	o, err := parseOptions(string(b))
	if err != nil {
		return o, err
	}
	for _, file := range []string{processFile, handedProcess} {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = json.Unmarshal(b, &o.process)
		}
		if err != nil {
			return o, fmt.Errorf("read %s: %w", file, err)
		}
	}
	return o, nil
}

// A process that the command line has no room for: in the initramfs, and where
// the agent beside an image's own init finds it.
const (
	processFile   = "/process.json"
	handedProcess = "/run/ingot/process.json"
)

// parseOptions reads the words it knows and leaves the rest to others. Of a word
// that is there twice the last one counts, as in the kernel.
func parseOptions(line string) (options, error) {
	o := options{root: "/dev/vda", powerOff: "off", nic: "eth1"}
	for _, w := range strings.Fields(line) {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "root":
			o.root = value
		case "rootfstype":
			o.rootType = value
		case "ds":
			o.seeded = true
		case "rootflags":
			o.rootFlags = value
		case "ro":
			o.readOnly = true
		case "rw":
			o.readOnly = false
		case "ingot.hostname":
			o.hostname = value
		case "ingot.poweroff":
			o.powerOff = value
		case "ingot.nic":
			o.nic = value
		case "ingot.mount":
			if m, ok := parseMount(value); ok {
				o.mounts = append(o.mounts, m)
			}
		case "ingot.process":
			b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(value, "="))
			if err == nil {
				err = json.Unmarshal(b, &o.process)
			}
			if err != nil {
				return o, fmt.Errorf("read ingot.process: %w", err)
			}
		case "network-config":
			b, err := base64.StdEncoding.DecodeString(value)
			if err != nil {
				return o, fmt.Errorf("read network-config: %w", err)
			}
			o.network = string(b)
		}
	}
	return o, nil
}

func parseMount(value string) (mount, bool) {
	device, path, ok := strings.Cut(value, ":")
	path, readOnly := strings.CutSuffix(path, ":ro")
	return mount{device, path, readOnly}, ok && strings.HasPrefix(path, "/")
}
