package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"ingot/internal/pool"
	"ingot/internal/vm"
)

func registerSnapshotter(root string, size vm.MiB) {
	registry.Register(&plugin.Registration{
		Type: plugins.SnapshotPlugin,
		ID:   "blockfile",
		InitFn: func(ic *plugin.InitContext) (any, error) {
			ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
			ic.Meta.Exports[plugins.SnapshotterRootDir] = root
			return openBlockfile(ic.Context, root, size)
		},
	})
}

// ensureScratch makes the empty file system that an image's first layer starts from.
func ensureScratch(ctx context.Context, path string, size vm.MiB) error {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	mkfs, err := pool.Tool("mkfs.ext4", "e2fsprogs")
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	part := path + ".part"
	defer os.Remove(part)
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size.Bytes()); err != nil {
		return err
	}
	// With discard, mkfs knows that the file is zeroes and marks the inode
	// tables as done; without, every guest would write them again, unshared. No
	// blocks are kept for root: the disk has one user.
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-E", "discard,root_owner=0:0", part)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make %s: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(part, path)
}

// ownBytes is what a file takes that no other file shares.
func ownBytes(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return exclusive(f)
}

func trimLabel(field string) (string, bool) { return strings.CutPrefix(field, "labels.") }

// fieldsOf gives containerd's filters the fields that its own snapshotters have.
func fieldsOf(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			v, ok := info.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}
