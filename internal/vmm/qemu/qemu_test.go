package qemu_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"ingot/internal/image/build"
	"ingot/internal/kvm"
	"ingot/internal/need"
	"ingot/internal/vmm"
	"ingot/internal/vmm/qemu"
	"ingot/internal/vmm/vmmtest"
)

func TestSuite(t *testing.T) {
	need.Root(t)
	need.QEMU(t)
	verdict := kvm.Probe()
	t.Logf("kvm: %+v", verdict)
	vmmtest.Run(t, func(testing.TB) vmm.Driver { return qemu.New(qemu.Config{KVM: verdict}) }, guest(t))
}

// guest makes what the suite boots, once for this process and the ones that it
// starts of itself.
func guest(t testing.TB) vmmtest.Guest {
	t.Helper()
	dir := os.Getenv("INGOT_QEMU_TEST_GUEST")
	if dir == "" {
		dir = t.TempDir()
		t.Setenv("INGOT_QEMU_TEST_GUEST", dir)
		if err := makeGuest(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	}
	return vmmtest.Guest{Kernel: filepath.Join(dir, "boot/vmlinux"), Initrd: filepath.Join(dir, "boot/initrd")}
}

func makeGuest(ctx context.Context, dir string) error {
	program := filepath.Join(dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", program, "-ldflags", "-s -w", "../vmmtest/testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest's program: %w: %s", err, out)
	}
	init, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	image, err := build.Kernel(ctx, build.Options{}, init)
	if err != nil {
		return err
	}
	files := mutate.Extract(image)
	defer files.Close()
	if err := os.Mkdir(filepath.Join(dir, "boot"), 0o755); err != nil {
		return err
	}
	for t := tar.NewReader(files); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Name != build.KernelPath && h.Name != build.InitrdPath {
			continue
		}
		data, err := io.ReadAll(t)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, h.Name), data, 0o644); err != nil {
			return err
		}
	}
}
