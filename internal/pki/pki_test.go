package pki_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ingot/internal/pki"
)

var local = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

func authority(t *testing.T, dir string) *pki.CA {
	t.Helper()
	ca, err := pki.OpenCA(dir, "test")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func ensure(t *testing.T, ca *pki.CA, dir string, addrs []netip.Addr) bool {
	t.Helper()
	changed, err := ca.Ensure(dir, "test", []string{"host-0"}, addrs)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

// handshake connects two parties and returns what the client was told.
func handshake(t *testing.T, server, client pki.Files) error {
	t.Helper()
	sc, err := server.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return shake(t, sc.Config(), client)
}

// shake connects a client to a server.
func shake(t *testing.T, server *tls.Config, client pki.Files) error {
	t.Helper()
	cc, err := client.Client()
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), cc)
	if err != nil {
		return err
	}
	defer c.Close()
	// With TLS 1.3 a refused client certificate shows in the first read.
	_, err = c.Read(make([]byte, 1))
	return err
}

func TestMutualTLS(t *testing.T) {
	ca, other := authority(t, t.TempDir()), authority(t, t.TempDir())
	server, client, stranger := t.TempDir(), t.TempDir(), t.TempDir()
	ensure(t, ca, server, local)
	ensure(t, ca, client, nil)
	ensure(t, other, stranger, nil)
	if err := handshake(t, pki.In(server), pki.In(client)); err != nil {
		t.Errorf("client of the environment: %v", err)
	}
	noCert := pki.Files{CA: pki.In(client).CA}
	if err := handshake(t, pki.In(server), noCert); err == nil {
		t.Error("a client without a certificate got in")
	}
	foreign := pki.In(stranger)
	foreign.CA = pki.In(client).CA
	if err := handshake(t, pki.In(server), foreign); err == nil {
		t.Error("a client of another CA got in")
	}
	if err := handshake(t, pki.In(server), pki.In(stranger)); err == nil {
		t.Error("a server of another CA was trusted")
	}
}

func TestEnsureMakesAnewOnlyWhatIsNotGood(t *testing.T) {
	dir, certs := t.TempDir(), t.TempDir()
	ca := authority(t, dir)
	if !ensure(t, ca, certs, local) || ensure(t, authority(t, dir), certs, local) {
		t.Error("the second time changed something, or the first did not")
	}
	if !ensure(t, ca, certs, []netip.Addr{netip.MustParseAddr("10.0.0.1")}) {
		t.Error("another address needs another certificate")
	}
	if !ensure(t, authority(t, t.TempDir()), certs, nil) {
		t.Error("another CA needs another certificate")
	}
	for _, f := range []string{dir + "/ca.key", certs + "/key.pem"} {
		if i, err := os.Stat(f); err != nil || i.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", f, i.Mode(), err)
		}
	}
}

// Ensure may be killed, or find the disk full, after any of its files.
func TestEnsureMendsHalfWrittenCertificates(t *testing.T) {
	ca := authority(t, t.TempDir())
	other := t.TempDir()
	ensure(t, authority(t, t.TempDir()), other, local)
	for _, name := range []string{"ca.pem", "key.pem", "cert.pem"} {
		dir := t.TempDir()
		ensure(t, ca, dir, local)
		b, err := os.ReadFile(filepath.Join(other, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if !ensure(t, ca, dir, local) || ensure(t, ca, dir, local) {
			t.Errorf("a foreign %s: it is not made again, or twice", name)
		}
	}
	// A file that can't be written: none after it is.
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "key.pem", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Ensure(dir, "test", nil, local); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(filepath.Join(dir, "cert.pem")); !os.IsNotExist(err) {
		t.Errorf("the certificate of a key that was not written: %v", err)
	}
}

func TestReadToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	for text, want := range map[string]pki.Secret{"": "", " \n": "", "secret\n": "secret"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := pki.ReadToken(path); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v", text, string(got), err)
		}
	}
	if _, err := pki.ReadToken(path + "-not-there"); !os.IsNotExist(errors.Unwrap(err)) {
		t.Errorf("no file: %v", err)
	}
}

func TestSecretIsNotShown(t *testing.T) {
	s := pki.NewToken()
	var b strings.Builder
	slog.New(slog.NewTextHandler(&b, nil)).Info("x", "token", s)
	fmt.Fprintf(&b, "%s %v %#v", s, s, s)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "inside", struct{ Token pki.Secret }{s})
	if strings.Contains(b.String(), string(s)) || len(s) < 20 {
		t.Errorf("shown: %s", b.String())
	}
}
