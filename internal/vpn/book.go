package vpn

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// The files of a server's directory.
const (
	KeyFile    = "key"         // its private key
	PeersFile  = "peers.json"  // who may come in
	placesFile = "places.json" // where peers were heard from last
)

// validName is what a peer can be called: wg-quick takes the shorter ones as names
// of interfaces.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// CheckName says what is wrong with a peer's name.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%q is not a peer's name: letters, digits, '.', '_' and '-', 63 at most, a letter or digit first: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// form is the peers' file.
type form struct {
	Format int    `json:"format"`
	Peers  []Peer `json:"peers"`
}

// readKey reads the server's key, and makes one if there is none yet.
func readKey(dir string) (PrivateKey, error) {
	path := filepath.Join(dir, KeyFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		k, err := NewPrivateKey()
		if err != nil {
			return k, err
		}
		return k, writeFile(path, []byte(k.Text()+"\n"))
	}
	if err != nil {
		return PrivateKey{}, err
	}
	k, err := parsePrivateKey(strings.TrimSpace(string(b)))
	if err != nil {
		return k, fmt.Errorf("read %s: %w", path, err)
	}
	return k, nil
}

// ReadPeers reads who may come in; none if there is no file yet.
func ReadPeers(dir string) ([]Peer, error) {
	path := filepath.Join(dir, PeersFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	peers, err := parsePeers(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return peers, nil
}

// parsePeers is strict: a file that somebody has edited must not let in whom it does
// not mean.
func parsePeers(b []byte) ([]Peer, error) {
	var f form
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, err
	}
	if f.Format != 1 {
		return nil, fmt.Errorf("format %d is not known to this version", f.Format)
	}
	names, keys, addresses := map[string]bool{}, map[Key]bool{}, map[netip.Addr]bool{}
	for _, p := range f.Peers {
		switch {
		case CheckName(p.Name) != nil:
			return nil, CheckName(p.Name)
		case p.Key == Key{}:
			return nil, fmt.Errorf("%s has no public key", p.Name)
		case !p.Address.Is4():
			return nil, fmt.Errorf("%s has no IPv4 address", p.Name)
		case names[p.Name] || keys[p.Key] || addresses[p.Address]:
			return nil, fmt.Errorf("%s has the name, the key or the address of another", p.Name)
		}
		names[p.Name], keys[p.Key], addresses[p.Address] = true, true, true
	}
	return f.Peers, nil
}

func writePeers(dir string, peers []Peer) error {
	b, err := json.MarshalIndent(form{Format: 1, Peers: peers}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, PeersFile), append(b, '\n'))
}

// readPlaces reads where peers were heard from last. What can't be read is nowhere.
func readPlaces(dir string) map[Key]netip.AddrPort {
	var places map[Key]netip.AddrPort
	b, err := os.ReadFile(filepath.Join(dir, placesFile))
	if err != nil || json.Unmarshal(b, &places) != nil {
		return nil
	}
	return places
}

// writePlaces does not wait for the disk: it is only a hint.
func writePlaces(dir string, places map[Key]netip.AddrPort) error {
	b, err := json.Marshal(places)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, placesFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// writeFile replaces a file in one step, which outlives a crash of the machine.
func writeFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
