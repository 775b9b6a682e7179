package vpn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.zx2c4.com/wireguard/wgctrl"

	"ingot/internal/link"
)

// Settings are a server's.
type Settings struct {
	Dir       string // what is kept: the key, and who the peers are
	Interface string
	Subnet    netip.Prefix // of the peers; the first address is the server's own
	Port      uint16       // UDP
	Log       *slog.Logger
}

// Server lets peers in, and keeps who they are. It goes on when it can't: what
// else its process does must not end for that. It implements run.Task.
type Server struct {
	s     Settings
	ready chan struct{}
	once  sync.Once

	mu     sync.Mutex // guards the rest, and that disk and interface are as peers says
	device *Device    // nil: it does not serve, and err says why
	err    error
	key    PrivateKey
	peers  []Peer
	places map[Key]netip.AddrPort // where they are, as disk has it
}

// New makes a server of its settings.
func New(s Settings) *Server {
	return &Server{s: s, ready: make(chan struct{}), err: errors.New("it has not begun yet")}
}

// Address is the server's own address, with the subnet of its peers.
func Address(subnet netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(subnet.Masked().Addr().Next(), subnet.Bits())
}

// pause is the time between two tries to serve, and between two looks at whether the
// interface is there, and where peers are.
const pause = 5 * time.Second

// Run serves until ctx ends. What it can't do it tries again.
func (s *Server) Run(ctx context.Context) error {
	defer s.close()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for said := ""; ; {
		err := s.open(ctx)
		switch {
		case err == nil:
			said = ""
			s.once.Do(func() { close(s.ready) })
		case err.Error() != said:
			said = err.Error()
			s.s.Log.Error("the VPN does not serve, and is tried again and again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if s.look() {
				continue
			}
		case <-s.gone():
		}
		if ctx.Err() == nil {
			s.s.Log.Warn("somebody took the VPN's interface away: it is made again")
			s.close()
		}
	}
}

// Ready is closed once peers can come in.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "vpn" }

func (s *Server) open(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device != nil {
		return nil
	}
	defer func() { s.err = err }()
	if s.key, err = readKey(s.s.Dir); err != nil {
		return err
	}
	if s.peers, err = ReadPeers(s.s.Dir); err != nil {
		return err
	}
	d, err := Open(ctx, s.s.Interface, s.s.Log)
	if err != nil {
		return err
	}
	_, err = d.Set(s.config())
	if err == nil && !d.Kernel() {
		err = d.Greet(readPlaces(s.s.Dir))
	}
	if err != nil {
		return errors.Join(err, d.Close())
	}
	s.device = d
	return nil
}

// look says whether the interface is there, if it was made, and notes where peers are,
// for a server that takes this one's place. The kernel's interface outlives a server,
// and knows it itself.
func (s *Server) look() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device == nil {
		return true
	}
	traffic, err := s.device.Traffic()
	if err != nil || s.device.Kernel() {
		return err == nil
	}
	now := map[Key]netip.AddrPort{}
	for key, t := range traffic {
		if t.Endpoint.IsValid() {
			now[key] = t.Endpoint
		}
	}
	if maps.Equal(now, s.places) {
		return true
	}
	if s.places = now; writePlaces(s.s.Dir, now) != nil {
		s.places = nil // later, then: all it costs is time
	}
	return true
}

func (s *Server) close() {
	s.look()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device == nil {
		return
	}
	if err := s.device.Close(); err != nil {
		s.s.Log.Warn("let go of the VPN's interface", "err", err)
	}
	s.device, s.err = nil, errors.New("it has ended")
}

func (s *Server) gone() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device == nil {
		return nil
	}
	return s.device.Gone()
}

// config is what the interface is to be. The caller holds s.mu. Who has an address of
// another subnet, which the server had before, is left out.
func (s *Server) config() Config {
	c := Config{Key: s.key, Address: Address(s.s.Subnet), Port: s.s.Port}
	for _, p := range s.peers {
		if s.s.Subnet.Contains(p.Address) {
			c.Peers = append(c.Peers, p)
		}
	}
	return c
}

// Add lets a peer in, and gives it an address. To add it again changes nothing.
func (s *Server) Add(name string, key Key) (Peer, error) {
	if err := CheckName(name); err != nil {
		return Peer{}, err
	}
	if key == (Key{}) {
		return Peer{}, fmt.Errorf("add peer %s: it has no public key: %w", name, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device == nil {
		return Peer{}, fmt.Errorf("add peer %s: the VPN does not serve: %w: %w", name, s.err, errdefs.ErrUnavailable)
	}
	for _, p := range s.peers {
		switch {
		case p.Name == name && p.Key == key && s.s.Subnet.Contains(p.Address):
			return p, nil
		case p.Name == name:
			return Peer{}, fmt.Errorf("add peer %s: %w, with another key: `ingot vpn remove %s` first, which cuts that one off", name, errdefs.ErrAlreadyExists, name)
		case p.Key == key:
			return Peer{}, fmt.Errorf("add peer %s: its key is that of %s: %w", name, p.Name, errdefs.ErrAlreadyExists)
		}
	}
	if key == s.key.Public() {
		return Peer{}, fmt.Errorf("add peer %s: its key is the hub's own: %w", name, errdefs.ErrInvalidArgument)
	}
	address, ok := s.free()
	if !ok {
		return Peer{}, fmt.Errorf("add peer %s: no address of %s is free: %w", name, s.s.Subnet, errdefs.ErrResourceExhausted)
	}
	p := Peer{Name: name, Key: key, Address: address, Added: time.Now().UTC().Truncate(time.Second)}
	return p, s.change(append(slices.Clone(s.peers), p))
}

// free is the first address that nobody has.
func (s *Server) free() (netip.Addr, bool) {
	used := map[netip.Addr]bool{}
	for _, p := range s.peers {
		used[p.Address] = true
	}
	for a := Address(s.s.Subnet).Addr().Next(); s.s.Subnet.Contains(a.Next()); a = a.Next() { // the last one is no device's
		if !used[a] {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// Remove cuts a peer off, at once and for good.
func (s *Server) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.device == nil {
		return fmt.Errorf("remove peer %s: the VPN does not serve: %w: %w", name, s.err, errdefs.ErrUnavailable)
	}
	left := slices.DeleteFunc(slices.Clone(s.peers), func(p Peer) bool { return p.Name == name })
	if len(left) == len(s.peers) {
		return fmt.Errorf("remove peer %s: %w; `ingot vpn list` shows who there is", name, errdefs.ErrNotFound)
	}
	return s.change(left)
}

// change makes disk and interface what peers says, or leaves both as they were. The
// caller holds s.mu.
func (s *Server) change(peers []Peer) error {
	before := s.peers
	if err := writePeers(s.s.Dir, peers); err != nil {
		return err
	}
	s.peers = peers
	if _, err := s.device.Set(s.config()); err != nil {
		s.peers = before
		return errors.Join(err, writePeers(s.s.Dir, before))
	}
	return nil
}

// Forget removes the interface that an earlier server of dir has left in the kernel.
// What it knows of peers stays, for a later one.
func Forget(dir, name string) error {
	i, err := link.Get(name)
	if errdefs.IsNotFound(err) {
		return removeSocket(name) // a killed process's
	}
	if err != nil || i.Kind != "wireguard" {
		return err
	}
	ctl, err := wgctrl.New()
	if err != nil {
		return fmt.Errorf("open WireGuard: %w", err)
	}
	defer ctl.Close()
	have, err := ctl.Device(name)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if _, err := os.Stat(filepath.Join(dir, KeyFile)); err != nil {
		return nil // it is somebody else's
	}
	key, err := readKey(dir)
	if err != nil || have.PrivateKey != key.key {
		return err
	}
	return link.Remove(name)
}

// Facts say how a server is.
type Facts struct {
	Error     error // why it does not serve; nil: it does
	Kernel    bool  // its packets go by the kernel's WireGuard
	Interface string
	Address   netip.Prefix
	Port      uint16
	Key       Key
	Peers     []PeerFacts
}

// PeerFacts say how a peer is.
type PeerFacts struct {
	Peer
	Traffic
	Outside bool // its address is of another subnet: it can't come in
}

// Facts say how the server is.
func (s *Server) Facts() Facts {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := Facts{Error: s.err, Interface: s.s.Interface, Address: Address(s.s.Subnet), Port: s.s.Port}
	var traffic map[Key]Traffic
	if s.device != nil {
		f.Key, f.Kernel = s.key.Public(), s.device.Kernel()
		if traffic, f.Error = s.device.Traffic(); f.Error != nil {
			f.Error = fmt.Errorf("its interface is gone: %w", f.Error)
		}
	}
	for _, p := range s.peers {
		f.Peers = append(f.Peers, PeerFacts{Peer: p, Traffic: traffic[p.Key], Outside: !s.s.Subnet.Contains(p.Address)})
	}
	return f
}
