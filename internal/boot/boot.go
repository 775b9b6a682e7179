// Package boot makes what a microVM boots with: an ELF kernel out of a bzImage,
// an initramfs, the kernel's command line, and the data that cloud-init asks
// for. It owns no files and runs nothing; what it makes is a function of what
// it is given, to the byte.
package boot

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"ingot/internal/vm"
)

// The command line words that the guest's init understands, beside root=, ro,
// rw, rootfstype=, rootflags= and network-config=.
const (
	WordHostname = "ingot.hostname"
	WordProcess  = "ingot.process" // base64url of JSON: {args,env,dir,user}
	WordPowerOff = "ingot.poweroff"
	WordNIC      = "ingot.nic"   // the interface on the segment, if it is not eth1
	WordMount    = "ingot.mount" // DEVICE:PATH or DEVICE:PATH:ro; may be repeated
)

// An x86 kernel takes 2048 bytes with the final zero. The driver adds a console
// and clock hints of its own.
const (
	maxCmdline = 2047
	reserved   = 128
)

// Cmdline is the kernel's command line, a word each: what every microVM has,
// with the spec's own words instead of or after it, then extra. The order is
// always the same. A process that is too long for it is left out, and is then in
// an archive that goes after the initramfs (AppendInitramfs).
func Cmdline(s vm.Spec, extra ...string) (words []string, archive []byte, err error) {
	words, err = wordsOf(s)
	if err != nil {
		return nil, nil, err
	}
	if !s.Process.IsZero() {
		process, err := json.Marshal(s.Process)
		if err != nil {
			return nil, nil, fmt.Errorf("encode the process: %w", err)
		}
		w := word(WordProcess, base64.RawURLEncoding.EncodeToString(process))
		if s.Initrd == nil || length(append(append(words, w), extra...)) <= maxCmdline-reserved {
			words = append(words, w)
		} else if archive, err = processArchive(process); err != nil {
			return nil, nil, err
		}
	}
	words = append(words, extra...)
	for _, w := range words {
		if i := strings.IndexFunc(w, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
			return nil, nil, fmt.Errorf("kernel command line: control character in %q: %w", w, errdefs.ErrInvalidArgument)
		}
	}
	if n := length(words); n > maxCmdline-reserved {
		return nil, nil, fmt.Errorf("kernel command line has %d bytes, the kernel takes %d: fewer interfaces or words of its own: %w",
			n, maxCmdline-reserved, errdefs.ErrInvalidArgument)
	}
	return words, archive, nil
}

func length(words []string) int { return len(strings.Join(words, " ")) }

// wordsOf are the words of a microVM without its process.
func wordsOf(s vm.Spec) ([]string, error) {
	words := defaults(s)
	own := maps.Clone(s.Kernel.Cmdline)
	for i, w := range words {
		key, _, _ := strings.Cut(w, "=")
		if value, ok := own[key]; ok && key != WordMount {
			words[i] = word(key, value)
			delete(own, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(own)) {
		words = append(words, word(key, own[key]))
	}
	if s.Kernel.AddNetworkConfig {
		config, err := NetworkConfig(s)
		if err != nil {
			return nil, err
		}
		words = append(words, "network-config="+base64.StdEncoding.EncodeToString([]byte(config)))
	}
	return words, nil
}

func word(key, value string) string {
	if value == "" {
		return key
	}
	return key + "=" + value
}

// defaults are the words of every microVM, in their order.
func defaults(s vm.Spec) []string {
	access := "rw"
	if s.Root.ReadOnly {
		access = "ro"
	}
	// net.ifnames=0: eth0 and eth1 are also called so by an image with udev.
	words := []string{"root=" + rootDevice(s.Root), access, "panic=-1", "quiet", "net.ifnames=0"}
	if s.UID != "" {
		// Clones of an image that brings a machine-id would be one machine, to DHCP for
		// example: systemd makes its identity there from it.
		sum := sha256.Sum256([]byte("machine-id/" + s.UID))
		words = append(words, fmt.Sprintf("systemd.machine_id=%x", sum[:16]))
	}
	if slices.ContainsFunc(s.Interfaces, func(i vm.Interface) bool { return i.Metadata }) {
		words = append(words, "ds=nocloud-net;s=http://169.254.169.254/latest/")
	}
	if s.Name != "" {
		words = append(words, word(WordHostname, s.Name))
	}
	letters := blockDevices(s)
	for _, v := range s.Volumes {
		if v.MountPoint == "" || v.VirtioFS != "" {
			continue
		}
		mount := word(WordMount, "/dev/"+letters[v.ID]+":"+v.MountPoint)
		if v.ReadOnly {
			mount += ":ro"
		}
		words = append(words, mount)
	}
	return words
}

// rootDevice is the first disk, or the partition of it that the spec names: a
// number, or a partition's UUID.
func rootDevice(root vm.Volume) string {
	switch p := root.Partition; {
	case p == "":
		return "/dev/vda"
	case strings.Trim(p, "0123456789") == "":
		return "/dev/vda" + p
	default:
		return "PARTUUID=" + p
	}
}

// blockDevices are the names of the volumes in the guest, by id: vdb, vdc, …, in
// order. Virtiofs volumes are no disks.
func blockDevices(s vm.Spec) map[string]string {
	names := map[string]string{}
	n := 0
	for _, v := range s.Volumes {
		if v.VirtioFS == "" {
			n++
			names[v.ID] = diskName(n)
		}
	}
	return names
}

// diskName is the n-th virtio disk's, from 0: vda, …, vdz, vdaa, …
func diskName(n int) string {
	suffix := ""
	for n++; n > 0; n = (n - 1) / 26 {
		suffix = string(rune('a'+(n-1)%26)) + suffix
	}
	return "vd" + suffix
}
