package build

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"ingot/internal/boot"
)

// Where the files of a kernel image are.
const (
	KernelPath = "boot/vmlinux"
	InitrdPath = "boot/initrd"
)

// kernelPackage is the newest kernel for virtual machines that Debian has.
const kernelPackage = "linux-image-cloud-amd64"

// wanted are the modules that a guest needs, in the order of loading: what
// leads to an address, to the root file system, to the agent, and the rest.
// What they need comes before them.
var wanted = []string{
	"virtio_mmio", "virtio_pci", "virtio_net", "virtio_blk", "virtio_console",
	"virtio-rng", "button", "evdev", "pvpanic-mmio", "pvpanic-pci", "virtio_balloon",
	"nls_cp437", "nls_ascii", "nls_utf8", "vfat",
}

// Kernel builds the kernel image: Debian's kernel for virtual machines as an
// ELF file, and an initramfs with its drivers and init.
func Kernel(ctx context.Context, o Options, init []byte) (v1.Image, error) {
	return build(ctx, o, "kernel", func() (v1.Image, error) { return kernelImage(ctx, o, init) })
}

func kernelImage(ctx context.Context, o Options, init []byte) (v1.Image, error) {
	k, err := kernel(ctx, o)
	if err != nil {
		return nil, err
	}
	o.say("assemble kernel image %s", k.version)
	var initrd bytes.Buffer
	if err := boot.Initramfs(&initrd, init, k.modules); err != nil {
		return nil, err
	}
	second, err := memoryLayer(func(a *archive) {
		a.dir("boot", 0o755)
		a.file(InitrdPath, 0o644, initrd.Bytes())
	})
	if err != nil {
		return nil, err
	}
	return assemble(v1.Config{Labels: map[string]string{labelTitle: "kernel", LabelVersion: k.version}}, k.layer, second)
}

// kernelFiles are what is taken out of a kernel package.
type kernelFiles struct {
	version string    // 6.1.0-56-cloud-amd64
	layer   keptLayer // with the ELF kernel
	modules []boot.Module
}

// kernel finds the newest kernel, and takes it apart unless that was done before.
func kernel(ctx context.Context, o Options) (kernelFiles, error) {
	name, err := dependency(ctx, o, kernelPackage, "linux-image-")
	if err != nil {
		return kernelFiles{}, err
	}
	p, err := fetch(ctx, o, name)
	if err != nil {
		return kernelFiles{}, err
	}
	dir := filepath.Join(o.cache(), "kernel", strings.TrimSuffix(filepath.Base(p.file), ".deb"))
	k := kernelFiles{version: strings.TrimPrefix(name, "linux-image-")}
	if err := k.read(dir); err == nil {
		return k, nil
	}
	o.say("unpack kernel %s", k.version)
	if err := takeApart(ctx, p, dir); err != nil {
		return kernelFiles{}, err
	}
	return k, k.read(dir)
}

func (k *kernelFiles) read(dir string) (err error) {
	if k.modules, err = readModules(dir); err == nil {
		k.layer, err = openLayer(layerPath(dir))
	}
	return err
}

func layerPath(dir string) string { return filepath.Join(dir, "vmlinux.tar.gz") }

// takeApart writes the kernel's layer, the modules, and, last, the modules' list.
func takeApart(ctx context.Context, p debPackage, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var image []byte
	needs := map[string]module{}
	err := p.each(ctx, func(name string, h *tar.Header, r io.Reader) (err error) {
		switch {
		case strings.HasPrefix(name, "boot/vmlinuz-"):
			image, err = io.ReadAll(r)
		case strings.HasSuffix(name, ".ko"):
			var m module
			if m, err = readModule(name, r); err == nil {
				needs[m.name] = m
			}
		case isCompressed(name):
			err = fmt.Errorf("kernel module %s is compressed, which this build can't read: %w", name, errdefs.ErrNotImplemented)
		}
		return err
	})
	if err != nil {
		return err
	}
	if image == nil {
		return fmt.Errorf("package %s has no kernel: %w", p.name, errdefs.ErrNotFound)
	}
	vmlinux, err := boot.ExtractVmlinux(image)
	if err != nil {
		return err
	}
	err = writeLayer(layerPath(dir), func(a *archive) {
		a.dir("boot", 0o755)
		a.file(KernelPath, 0o644, vmlinux)
	})
	if err != nil {
		return fmt.Errorf("write the kernel's layer: %w", err)
	}
	order, err := loadOrder(needs, wanted)
	if err != nil {
		return err
	}
	return writeModules(ctx, p, dir, order, needs)
}

// isCompressed says whether a file is a kernel module that is compressed, as newer
// kernels' packages may have them.
func isCompressed(name string) bool {
	module := strings.TrimSuffix(name, path.Ext(name))
	return strings.HasSuffix(module, ".ko")
}

// module is a kernel module and what it says that it needs.
type module struct {
	name  string // as others call it: with underscores
	path  string
	needs []string
}

// readModule reads what depmod would: a Debian package has no modules.dep.
func readModule(name string, r io.Reader) (module, error) {
	m := module{name: moduleName(strings.TrimSuffix(path.Base(name), ".ko")), path: name}
	b, err := io.ReadAll(r)
	if err != nil {
		return m, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return m, fmt.Errorf("read module %s: %w", name, err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return m, nil
	}
	info, err := section.Data()
	if err != nil {
		return m, fmt.Errorf("read module %s: %w", name, err)
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			for n := range strings.SplitSeq(list, ",") {
				m.needs = append(m.needs, moduleName(n))
			}
		}
	}
	return m, nil
}

// moduleName is a module's one name: files use dashes and underscores alike.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// loadOrder is the wanted modules with their needs before them. A wanted module
// that is not there is built in or not known to this kernel; a needed one must be.
func loadOrder(all map[string]module, wanted []string) ([]string, error) {
	if len(all) == 0 {
		return nil, fmt.Errorf("the kernel's package has no modules: %w", errdefs.ErrNotFound)
	}
	var order []string
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		m, ok := all[name]
		if !ok {
			return fmt.Errorf("kernel module %s is needed and not there: %w", name, errdefs.ErrNotFound)
		}
		for _, n := range m.needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		order = append(order, name)
		return nil
	}
	for _, w := range wanted {
		if _, ok := all[moduleName(w)]; !ok {
			continue
		}
		if err := visit(moduleName(w)); err != nil {
			return nil, err
		}
	}
	return order, nil
}

const moduleList = "modules.list"

// writeModules copies the modules out of the package, in a second pass: all of
// them together are too much to hold.
func writeModules(ctx context.Context, p debPackage, dir string, order []string, all map[string]module) error {
	paths := map[string]string{}
	for _, n := range order {
		paths[all[n].path] = n
	}
	err := p.each(ctx, func(name string, h *tar.Header, r io.Reader) error {
		n, ok := paths[name]
		if !ok {
			return nil
		}
		return writeFile(filepath.Join(dir, n+".ko"), func(w io.Writer) error {
			_, err := io.Copy(w, r)
			return err
		})
	})
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, moduleList), func(w io.Writer) error {
		_, err := io.WriteString(w, strings.Join(wanted, " ")+"\n"+strings.Join(order, "\n")+"\n")
		return err
	})
}

// readModules reads what writeModules wrote, if it was for the same wishes.
func readModules(dir string) ([]boot.Module, error) {
	b, err := os.ReadFile(filepath.Join(dir, moduleList))
	if err != nil {
		return nil, err
	}
	wishes, list, _ := strings.Cut(string(b), "\n")
	if wishes != strings.Join(wanted, " ") {
		return nil, errors.New("made for other modules")
	}
	var modules []boot.Module
	for name := range strings.FieldsSeq(list) {
		data, err := os.ReadFile(filepath.Join(dir, name+".ko"))
		if err != nil {
			return nil, err
		}
		modules = append(modules, boot.Module{Name: name, Data: data})
	}
	return modules, nil
}
