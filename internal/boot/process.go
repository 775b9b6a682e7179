package boot

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"ingot/internal/vm"
)

// Process is what a microVM runs: what the spec says, and where it says
// nothing, what its image does. As with docker, a spec's arguments take the place
// of the image's CMD, and its entrypoint that of both. A bare shell, which many
// images name, would end at once where nobody is connected to it; it counts as
// nothing.
func Process(spec, image vm.Process) vm.Process {
	p := spec
	entry := spec.Entrypoint
	if len(entry) == 0 {
		entry = image.Entrypoint
		if len(p.Args) == 0 {
			p.Args = image.Args
		}
	} else if entry[0] == "" {
		entry = entry[1:]
	}
	p.Args, p.Entrypoint = slices.Concat(entry, p.Args), nil
	if spec.Attach && len(p.Args) == 0 {
		p.Args = []string{"sh"}
	}
	if !spec.Attach && len(spec.Args) == 0 && len(spec.Entrypoint) == 0 && bareShell(p.Args) {
		p.Args = nil
	}
	p.Env = maps.Clone(image.Env)
	if p.Env == nil {
		p.Env = map[string]string{}
	}
	maps.Copy(p.Env, spec.Env)
	for _, f := range []struct{ own, images *string }{{&p.Dir, &image.Dir}, {&p.User, &image.User}, {&p.StopSignal, &image.StopSignal}} {
		if *f.own == "" {
			*f.own = *f.images
		}
	}
	return p
}

func bareShell(args []string) bool {
	if len(args) != 1 {
		return false
	}
	name := args[0][strings.LastIndexByte(args[0], '/')+1:]
	return slices.Contains([]string{"sh", "bash", "ash", "dash", "zsh"}, name)
}

// ProcessFile is where the guest's init finds a process that the command line
// has no room for.
const ProcessFile = "/process.json"

// processArchive is an initramfs with the process alone.
func processArchive(process []byte) ([]byte, error) {
	var b bytes.Buffer
	c := newCPIO(&b)
	c.add(strings.TrimPrefix(ProcessFile, "/"), 0o100600, 0, process)
	if err := c.close(); err != nil {
		return nil, fmt.Errorf("write the process: %w", err)
	}
	return b.Bytes(), nil
}

// AppendInitramfs writes an initramfs with an archive after it: the kernel
// unpacks both, if the second begins at a multiple of four.
func AppendInitramfs(w io.Writer, initramfs io.Reader, archive []byte) error {
	n, err := io.Copy(w, initramfs)
	if err == nil {
		_, err = w.Write(append(make([]byte, -n&3), archive...))
	}
	if err != nil {
		return fmt.Errorf("append to the initramfs: %w", err)
	}
	return nil
}
