package vpn

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// sockets is where wg(8) and the library that we configure interfaces with look for
// those that are no kernel's.
const sockets = "/var/run/wireguard"

// userspace is an interface whose packets go through this process. It ends with it.
type userspace struct {
	device  *device.Device
	socket  net.Listener
	end     context.CancelFunc // of the conversations
	talking sync.WaitGroup
}

func openUserspace(ctx context.Context, name string, log *slog.Logger) (*userspace, error) {
	t, err := tun.CreateTUN(name, device.DefaultMTU)
	if err != nil {
		return nil, fmt.Errorf("make tun device %s: %w", name, err)
	}
	u := &userspace{device: device.NewDevice(t, conn.NewDefaultBind(), &device.Logger{
		Verbosef: device.DiscardLogf, // strangers at the port, and each handshake
		Errorf:   func(format string, a ...any) { log.Warn("wireguard", "err", fmt.Sprintf(format, a...)) },
	})}
	// Now, and not when the interface's state is heard of: then nobody would hear that
	// the port is in use.
	if err = u.device.Up(); err == nil {
		u.socket, err = listen(name)
	}
	if err != nil {
		u.device.Close()
		return nil, fmt.Errorf("start WireGuard on %s: %w", name, err)
	}
	ctx, u.end = context.WithCancel(context.WithoutCancel(ctx))
	u.talking.Go(func() { u.serve(ctx) })
	return u, nil
}

// listen makes a socket that root alone reaches, in the place of a killed process's.
func listen(name string) (net.Listener, error) {
	if err := os.MkdirAll(sockets, 0o700); err != nil {
		return nil, err
	}
	if err := removeSocket(name); err != nil {
		return nil, err
	}
	return net.Listen("unix", socket(name))
}

func socket(name string) string { return filepath.Join(sockets, name+".sock") }

func removeSocket(name string) error {
	if err := os.Remove(socket(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// serve answers who configures the interface.
func (u *userspace) serve(ctx context.Context) {
	for {
		c, err := u.socket.Accept()
		if err != nil {
			return
		}
		u.talking.Go(func() {
			defer context.AfterFunc(ctx, func() { c.Close() })()
			u.device.IpcHandle(c)
		})
	}
}

func (u *userspace) close() {
	u.socket.Close()
	u.end()
	u.talking.Wait()
	u.device.Close()
}
