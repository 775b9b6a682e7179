// Package metadata is 169.254.169.254 for one guest: a small HTTP server on the
// guest's own tap device, which answers with text by key. It owns a listening
// socket and nothing of the device; who made the tap has given it the address
// (link.Metadata) and keeps the guest from other addresses.
//
// The paths are those of Firecracker's MMDS in version 1, as flintlock's images
// use them: /latest/ lists the keys, /latest/KEY is a value. With them, and the
// kernel's word ds=nocloud-net;s=http://169.254.169.254/latest/, it is a seed of
// cloud-init's NoCloud too.
package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"ingot/internal/run"
)

// Address is where guests ask.
const Address = "169.254.169.254:80"

// The keys that cloud-init asks for, and does not do without.
const (
	UserData = "user-data"
	MetaData = "meta-data"
)

// vendorData is one that it asks for ten times if it is not there, a second apart.
const vendorData = "vendor-data"

// emptyUserData is what a guest without user data gets. An empty answer would
// make cloud-init warn.
const emptyUserData = "#cloud-config\n{}\n"

// What one guest may take of the host.
const (
	maxConnections = 16
	maxHeader      = 8 << 10
	timeout        = 10 * time.Second
)

// Server answers one guest.
type Server struct {
	http    *http.Server
	serving sync.WaitGroup

	mu     sync.RWMutex
	values map[string]string
}

// Listen serves the guest behind a device of this network namespace. Guests all
// ask the same address: each listener hears only what came in by its device.
func Listen(ctx context.Context, device string) (*Server, error) {
	if device == "" {
		return nil, fmt.Errorf("serve metadata: no device is named: %w", errdefs.ErrInvalidArgument)
	}
	config := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error { return bind(conn, device) }}
	l, err := run.Listen(ctx, config, "tcp4", Address)
	if err != nil {
		return nil, fmt.Errorf("serve metadata on %s: %w", device, err)
	}
	s := &Server{values: map[string]string{}}
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: timeout, ReadTimeout: timeout, WriteTimeout: timeout, IdleTimeout: timeout,
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
	}
	s.serving.Go(func() { s.http.Serve(limit(l, maxConnections)) })
	return s, nil
}

// bind ties a socket to a device before it gets its address, which need not be
// there yet, nor be this device's only.
func bind(conn syscall.RawConn, device string) error {
	var result error
	err := conn.Control(func(fd uintptr) {
		result = errors.Join(
			unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, device),
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1),
		)
	})
	return errors.Join(err, result)
}

// Set replaces all keys and values. Requests that run see the old or the new.
func (s *Server) Set(values map[string]string) {
	values = maps.Clone(values)
	if values == nil {
		values = map[string]string{}
	}
	if values[UserData] == "" {
		values[UserData] = emptyUserData
	}
	for _, key := range []string{MetaData, vendorData} {
		if _, ok := values[key]; !ok {
			values[key] = ""
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = values
}

// Close stops serving and ends the connections.
func (s *Server) Close() error {
	err := s.http.Close()
	s.serving.Wait()
	return err
}

// ServeHTTP answers a guest. Bodies are not read.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "metadata can only be read", http.StatusMethodNotAllowed)
		return
	}
	s.mu.RLock()
	values := s.values // replaced as a whole, never changed
	s.mu.RUnlock()
	asJSON := strings.Contains(r.Header.Get("Accept"), "application/json")
	key, found := strings.CutPrefix(r.URL.Path, "/latest")
	key = strings.TrimSuffix(strings.TrimPrefix(key, "/"), "/")
	value, known := values[key]
	switch {
	case r.URL.Path == "/" || r.URL.Path == "":
		answer(w, asJSON, map[string]any{"latest": values}, "latest/\n")
	case found && key == "":
		keys := slices.Sorted(maps.Keys(values))
		answer(w, asJSON, values, strings.Join(keys, "\n")+"\n")
	case found && known:
		answer(w, asJSON, value, value)
	default:
		http.Error(w, "no such metadata: "+r.URL.Path, http.StatusNotFound)
	}
}

func answer(w http.ResponseWriter, asJSON bool, object any, text string) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if !asJSON {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, text)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(object)
}
