// Package daemon is containerd, built into this binary and run as a process of
// its own: content, images, leases and snapshots, behind the socket that every
// client of containerd knows. It owns that process's state and socket. It adds
// two plugins: a blockfile snapshotter that clones by reflink, and the claims
// of package claim. It runs no containers.
package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/containerd/v2/cmd/containerd/server"
	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"

	"ingot/internal/vm"
)

// DefaultVolumeSize is the size of a volume's file system. It is sparse, and a
// volume may be made larger, but not smaller.
const DefaultVolumeSize = vm.MiB(4 << 10)

// Config is all that the daemon needs. Paths are absolute.
type Config struct {
	Root       string // what outlives a boot
	State      string // what does not
	Socket     string
	Pool       string // a directory that can share blocks: pool.Path
	VolumeSize vm.MiB // 0: DefaultVolumeSize; it takes effect when the pool is empty
	Debug      bool
}

// Run is containerd, until ctx ends. It calls ready once the socket answers.
// A process can run it only once: containerd's plugins are global.
func Run(ctx context.Context, c Config, ready func()) error {
	start := time.Now()
	if c.VolumeSize == 0 {
		c.VolumeSize = DefaultVolumeSize
	}
	if err := prepare(ctx, c); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	registerSnapshotter(filepath.Join(c.Pool, "blockfile"), c.VolumeSize)
	registerClaims()
	log.G(ctx).WithFields(log.Fields{"version": version.Version, "revision": version.Revision}).Info("starting containerd")
	s, err := server.New(ctx, config(c))
	if err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	defer s.Stop()
	if err := s.Start(ctx); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	s.Wait()
	if err := answers(ctx, c.Socket); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	log.G(ctx).Infof("containerd successfully booted in %fs", time.Since(start).Seconds())
	// What starting up needed is more than what serving does.
	debug.FreeOSMemory()
	ready()
	<-ctx.Done()
	log.G(ctx).Info("stopping containerd")
	return nil
}

// prepare makes the directories, undoes what a killed predecessor left mounted,
// and makes sure that there is no predecessor.
func prepare(ctx context.Context, c Config) error {
	if c.Debug {
		if err := log.SetLevel("debug"); err != nil {
			return err
		}
	}
	// bbolt would wait for a predecessor's lock for ever.
	if err := answers(ctx, c.Socket); err == nil {
		return fmt.Errorf("another containerd serves %s: %w", c.Socket, errdefs.ErrAlreadyExists)
	}
	if err := server.CreateTopLevelDirectories(config(c)); err != nil {
		return err
	}
	// Its collector looks at no ingests while there are no blobs, not even an empty
	// directory of them: what an ill registry has sent a new machine would stay, and be
	// the beginning of what the next pull gets.
	if err := os.MkdirAll(filepath.Join(c.Root, "io.containerd.content.v1.content", "blobs"), 0o755); err != nil {
		return err
	}
	if err := mount.SetTempMountLocation(filepath.Join(c.Root, "tmpmounts")); err != nil {
		return err
	}
	warnings, err := mount.CleanupTempMounts(0)
	for _, w := range warnings {
		log.G(ctx).WithError(w).Warn("cleanup temp mount")
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("unmounting temp mounts")
	}
	return os.MkdirAll(filepath.Dir(c.Socket), 0o711)
}

func config(c Config) *srvconfig.Config {
	here := platforms.DefaultString()
	return &srvconfig.Config{
		Version:         version.ConfigVersion,
		Root:            c.Root,
		State:           c.State,
		RequiredPlugins: []string{"io.containerd.metadata.v1.bolt", "io.containerd.snapshotter.v1.blockfile", "io.containerd.grpc.v1.claims"},
		// A predecessor that was killed holds the database's lock until the kernel has buried it.
		Timeouts: map[string]string{"io.containerd.timeout.bolt.open": "10s"},
		Plugins: map[string]any{
			"io.containerd.server.v1.grpc": map[string]any{"address": c.Socket, "uid": 0, "gid": 0},
			"io.containerd.gc.v1.scheduler": map[string]any{
				// A deleted microVM's volumes are gone when the call returns; the
				// schedule only gathers those of deletes at the same time.
				"schedule_delay": "1ms", "startup_delay": "100ms", "deletion_threshold": 0,
			},
			"io.containerd.transfer.v1.local": map[string]any{"unpack_config": []map[string]any{
				{"platform": here, "snapshotter": "blockfile", "differ": "walking"},
				{"platform": here, "snapshotter": "native", "differ": "walking"},
			}},
		},
	}
}

// answers dials the socket. Starting it returns before it serves, and stopping
// a server that does not serve yet ends the process with an error.
func answers(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	return conn.Close()
}
