package vpn

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// Two keys that `wg genkey` and `wg pubkey` have made, for goldens.
const (
	private = "wCXai17gkehqhxUItCEiD1NYgBxiDGUSUNDdJDl0iFM="
	public  = "Nx2hISOMJhaE8xrLdXLbQqLHysoVVBX8b41SbAyhYzU="
)

func TestClientConfig(t *testing.T) {
	key, err := parsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ParseKey(public)
	if err != nil {
		t.Fatal(err)
	}
	c := Client{
		Comment: "laptop, in environment lab", Key: key, Public: key.Public(), Address: netip.MustParseAddr("10.91.0.2"), Server: server, Endpoint: "203.0.113.1:51820",
		Routes: []netip.Prefix{netip.MustParsePrefix("192.168.10.0/25"), netip.MustParsePrefix("10.91.0.1/32")},
	}
	whole, own := c, c
	whole.DNS, whole.Comment = []string{"192.168.10.2", "lab.internal"}, ""
	own.Key = PrivateKey{}
	for name, c := range map[string]Client{"client.conf": c, "client-dns.conf": whole, "client-own-key.conf": own} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, []byte(c.Config()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), c.Config()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestPrivateKeyIsNotShown(t *testing.T) {
	key, err := parsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("made", "key", key, "client", Client{Key: key})
	_, wrong := parsePrivateKey(private[:43])
	for _, text := range []string{log.String(), fmt.Sprintf("%v %+v %#v %s", key, key, key, key), wrong.Error()} {
		if strings.Contains(text, private[:20]) || strings.Contains(text, "[192 37") {
			t.Errorf("the key is in %s", text)
		}
	}
}

// TestBook is what a server keeps, without its interface.
func TestBook(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vpn")
	key, err := readKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := readKey(dir); err != nil || again != key {
		t.Errorf("the key is another one when it is read again: %v", err)
	}
	if peers, err := ReadPeers(dir); err != nil || len(peers) != 0 {
		t.Errorf("at first there are %v, %v", peers, err)
	}
	want := []Peer{{Name: "laptop", Key: key.Public(), Address: netip.MustParseAddr("10.91.0.2")}}
	if err := writePeers(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadPeers(dir)
	if err != nil || got[0] != want[0] {
		t.Errorf("got %v, %v", got, err)
	}
	for _, name := range []string{KeyFile, PeersFile} {
		if i, err := os.Stat(filepath.Join(dir, name)); err != nil || i.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, i.Mode(), err)
		}
	}
	// What is not a key is not replaced by one: peers know the old one.
	if err := os.WriteFile(filepath.Join(dir, KeyFile), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readKey(dir); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a torn key: %v", err)
	}
}

func TestParsePeers(t *testing.T) {
	peer := func(name, key, address string) string {
		return fmt.Sprintf(`{"name": %q, "public_key": %q, "address": %q, "added": "2026-01-02T03:04:05Z"}`, name, key, address)
	}
	const other = "Gite5RfNKo41L/0z3Lz1NRA8DOYM88s9Lw/+Q50GPBE="
	for text, want := range map[string]string{
		`{"format": 1, "peers": []}`: "",
		`{"format": 1, "peers": [` + peer("a", public, "10.0.0.2") + `,` + peer("b", other, "10.0.0.3") + `]}`: "",
		``:                             "EOF",
		`{"format": 2, "peers": []}`:   "format 2 is not known to this version",
		`{"format": 1, "peer": []}`:    `json: unknown field "peer"`,
		`{"format": 1, "peers": [{}]}`: `"" is not a peer's name`,
		`{"format": 1, "peers": [` + peer("../a", public, "10.0.0.2") + `]}`:                                    `"../a" is not a peer's name`,
		`{"format": 1, "peers": [{"name": "a", "address": "10.0.0.2"}]}`:                                        "a has no public key",
		`{"format": 1, "peers": [` + peer("a", public[:43], "10.0.0.2") + `]}`:                                  "is not a public key of WireGuard's",
		`{"format": 1, "peers": [` + peer("a", public, "fd00::2") + `]}`:                                        "a has no IPv4 address",
		`{"format": 1, "peers": [` + peer("a", public, "10.0.0.2") + `,` + peer("b", public, "10.0.0.3") + `]}`: "b has the name, the key or the address of another",
		`{"format": 1, "peers": [` + peer("a", public, "10.0.0.2") + `,` + peer("b", other, "10.0.0.2") + `]}`:  "b has the name, the key or the address of another",
	} {
		_, err := parsePeers([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// TestAddressesRunOut: a server that has no address left says so.
func TestAddressesRunOut(t *testing.T) {
	s := New(Settings{Subnet: netip.MustParsePrefix("10.91.0.0/29")})
	for want := range 5 {
		a, ok := s.free()
		if !ok || a.As4()[3] != byte(want+2) {
			t.Errorf("%v, %v", a, ok)
		}
		s.peers = append(s.peers, Peer{Address: a})
	}
	if a, ok := s.free(); ok {
		t.Errorf("one more is %s", a)
	}
}

func FuzzParseKey(f *testing.F) {
	for _, seed := range []string{public, private, "", "=", public[:42] + "h=", public + "\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		k, err := ParseKey(text)
		if err == nil && (k.String() != text || k == Key{}) {
			t.Errorf("%q is taken for %s", text, k)
		}
		if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Error(err)
		}
	})
}

func FuzzParsePeers(f *testing.F) {
	f.Add([]byte(`{"format": 1, "peers": [{"name": "a", "public_key": "` + public + `", "address": "10.0.0.2", "added": "2026-01-02T03:04:05Z"}]}`))
	f.Add([]byte(`{"format": 1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		peers, err := parsePeers(b)
		if err != nil {
			return
		}
		dir := t.TempDir()
		if err := writePeers(dir, peers); err != nil {
			if !slices.ContainsFunc(peers, func(p Peer) bool { return p.Added.Year() > 9999 || p.Added.Year() < 0 }) {
				t.Fatal(err)
			}
			return // RFC 3339 has no such years
		}
		again, err := ReadPeers(dir)
		if err != nil || len(again) != len(peers) {
			t.Fatalf("kept and read again: %v, %v", again, err)
		}
		for i := range peers {
			if again[i].Name != peers[i].Name || again[i].Key != peers[i].Key || again[i].Address != peers[i].Address {
				t.Errorf("%v is %v when it is read again", peers[i], again[i])
			}
		}
	})
}
