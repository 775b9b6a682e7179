package hub

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ingot/internal/need"
	"ingot/internal/tailscale"
)

// TestOtherTailscaled: a machine's own tailscaled is told nothing, neither to be the hub's
// router nor to leave its tailnet.
func TestOtherTailscaled(t *testing.T) {
	need.Root(t)
	need.NetNS(t) // and with it a /run of our own
	if err := os.MkdirAll(filepath.Dir(tailscale.Socket), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", tailscale.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan string, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			b := make([]byte, 100)
			if n, _ := c.Read(b); n > 0 {
				asked <- string(b[:n])
			}
			c.Close()
		}
	}()
	dir := t.TempDir()
	kept := write(t, dir+"/tailscaled.state", "{}")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	log := filepath.Join(dir, "log")
	r := tailscale.New(tailscale.Settings{Dir: dir, LogFile: log, KeyFile: write(t, dir+"/key", "tskey-auth-any"), Log: slog.New(slog.DiscardHandler)})
	if err := r.Run(ctx); err != nil {
		t.Error(err)
	}
	select {
	case what := <-asked:
		t.Errorf("it was asked %q", what)
	default:
	}
	if err := r.Facts(t.Context()).Error; err == nil || !strings.Contains(err.Error(), "another tailscaled runs") {
		t.Errorf("the router says %v", err)
	}
	if err := tailscale.Forget(t.Context(), dir, log); err == nil || !strings.Contains(err.Error(), "another tailscaled runs") {
		t.Errorf("forgetting says %v", err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
}
