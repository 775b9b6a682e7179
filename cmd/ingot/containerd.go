package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"ingot/internal/image/daemon"
	"ingot/internal/pool"
	"ingot/internal/run"
	"ingot/internal/vm"
)

// containerdConfig is the file that `ingot containerd --config` reads. An
// unknown key is an error.
type containerdConfig struct {
	Root       string `yaml:"root"`
	State      string `yaml:"state"`
	Address    string `yaml:"address"`
	Pool       string `yaml:"pool"`        // the directory that the volumes' pool is in
	PoolSize   vm.MiB `yaml:"pool-size"`   // MiB, of a pool that has to be made
	VolumeSize vm.MiB `yaml:"volume-size"` // MiB
	Debug      bool   `yaml:"debug"`
}

func defaultContainerdConfig() containerdConfig {
	return containerdConfig{
		Root:       "/var/lib/containerd",
		State:      "/run/containerd",
		Address:    "/run/containerd/containerd.sock",
		PoolSize:   pool.DefaultSize,
		VolumeSize: daemon.DefaultVolumeSize,
	}
}

// containerdCommand runs the embedded containerd in the foreground.
func containerdCommand() *cobra.Command {
	var file string
	flags := defaultContainerdConfig()
	cmd := &cobra.Command{
		Use:   "containerd",
		Short: "Run the containerd that is built in: images, volumes, leases",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readContainerdConfig(file)
			if err != nil {
				return err
			}
			for name, set := range map[string]func(){
				"root":        func() { c.Root = flags.Root },
				"state":       func() { c.State = flags.State },
				"address":     func() { c.Address = flags.Address },
				"pool":        func() { c.Pool = flags.Pool },
				"pool-size":   func() { c.PoolSize = flags.PoolSize },
				"volume-size": func() { c.VolumeSize = flags.VolumeSize },
				"debug":       func() { c.Debug = flags.Debug },
			} {
				if cmd.Flags().Changed(name) {
					set()
				}
			}
			return runContainerd(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "YAML file with these flags as keys; flags override it")
	f.StringVar(&flags.Root, "root", flags.Root, "what outlives a boot")
	f.StringVar(&flags.State, "state", flags.State, "what does not outlive a boot")
	f.StringVarP(&flags.Address, "address", "a", flags.Address, "socket")
	f.StringVar(&flags.Pool, "pool", "", "directory that the volumes' pool is in (default: root)")
	f.Int64Var((*int64)(&flags.PoolSize), "pool-size", int64(flags.PoolSize), "MiB of a pool that has to be made; less where that does not fit")
	f.Int64Var((*int64)(&flags.VolumeSize), "volume-size", int64(flags.VolumeSize), "MiB of a volume's file system")
	f.BoolVar(&flags.Debug, "debug", false, "log more")
	return cmd
}

func readContainerdConfig(file string) (containerdConfig, error) {
	c := defaultContainerdConfig()
	if file == "" {
		return c, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if err := yaml.UnmarshalWithOptions(data, &c, yaml.Strict()); err != nil {
		return c, fmt.Errorf("read configuration %s: %w", file, err)
	}
	return c, nil
}

func runContainerd(ctx context.Context, c containerdConfig) error {
	if c.Pool == "" {
		c.Pool = c.Root
	}
	p, err := pool.Open(ctx, c.Pool, pool.Options{Size: c.PoolSize})
	if err != nil {
		return err
	}
	if err := linkDev(c.Address); err != nil {
		return err
	}
	return daemon.Run(ctx, daemon.Config{
		Root: c.Root, State: c.State, Socket: c.Address,
		Pool: p.Path(), VolumeSize: c.VolumeSize, Debug: c.Debug,
	}, func() {
		if err := run.Notify("READY=1"); err != nil {
			fmt.Fprintln(os.Stderr, "ingot:", err)
		}
	})
}

// linkDev makes /run/containerd-dev the same directory as /run/containerd:
// flintlock's scripts call the socket by that path.
func linkDev(address string) error {
	const dir = "/run/containerd"
	if filepath.Dir(address) != dir {
		return nil
	}
	err := os.Symlink(dir, dir+"-dev")
	if errors.Is(err, fs.ErrExist) {
		return nil // made before, or another's: then it is not ours to change
	}
	return err
}
