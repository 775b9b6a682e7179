// Package pki is an environment's own certificate authority: it makes the CA, the
// certificates of machines and operators, and the token. It keeps them as files,
// and knows nothing of who uses them.
package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// How long the CA and certificates are valid, and how long before its end a
// certificate is made anew.
const (
	caLife    = 10 * 365 * 24 * time.Hour
	certLife  = 365 * 24 * time.Hour
	renewTime = 30 * 24 * time.Hour
)

// Secret is text that is not for logs.
type Secret string

// LogValue hides the secret from slog.
func (Secret) LogValue() slog.Value { return slog.StringValue("***") }

// String hides the secret from fmt. A conversion to string shows it.
func (Secret) String() string { return "***" }

// GoString hides the secret from %#v.
func (Secret) GoString() string { return "***" }

// MarshalText hides the secret from encoding/json, which a log may be written by.
func (Secret) MarshalText() ([]byte, error) { return []byte("***"), nil }

// NewToken makes a token of 130 random bits.
func NewToken() Secret { return Secret(rand.Text()) }

// ReadToken reads a file that holds a token. One that is empty is an error, and
// not a server that asks for none.
func ReadToken(path string) (Secret, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("read token: %s is empty", path)
	}
	return Secret(token), nil
}

// CA signs certificates.
type CA struct {
	PEM  []byte // its own certificate
	cert *x509.Certificate
	key  crypto.Signer
}

// OpenCA reads the CA in dir, or makes one there if there is none.
func OpenCA(dir, name string) (*CA, error) {
	certFile, keyFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")
	if _, err := os.Stat(certFile); errors.Is(err, os.ErrNotExist) {
		if err := makeCA(certFile, keyFile, name); err != nil {
			return nil, fmt.Errorf("make certificate authority: %w", err)
		}
	}
	certPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	cert, err := parseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %s: %w", certFile, err)
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, fmt.Errorf("open certificate authority: %s holds no key", keyFile)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %s: %w", keyFile, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("open certificate authority: %s holds a %T", keyFile, key)
	}
	return &CA{PEM: certPEM, cert: cert, key: signer}, nil
}

func makeCA(certFile, keyFile, name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	// The key first: a CA without its key is no CA, and is not made again.
	if err := writeFile(keyFile, keyPEM, 0o600); err != nil {
		return err
	}
	return writeFile(certFile, encodeCert(der), 0o644)
}

// Issue makes a certificate for a machine or an operator, with which it may both
// serve under the names and addresses and be a client.
func (ca *CA) Issue(name string, names []string, addrs []netip.Addr) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("issue certificate for %s: %w", name, err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    names,
	}
	for _, a := range addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err == nil {
		keyPEM, err = encodeKey(key)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("issue certificate for %s: %w", name, err)
	}
	return encodeCert(der), keyPEM, nil
}

// Ensure keeps a certificate in dir (cert.pem, key.pem, ca.pem) that is valid for
// the names and addresses and has a month left, and says whether it made one.
func (ca *CA) Ensure(dir, name string, names []string, addrs []netip.Addr) (changed bool, err error) {
	if ca.good(dir, names, addrs) {
		return false, nil
	}
	certPEM, keyPEM, err := ca.Issue(name, names, addrs)
	if err != nil {
		return false, err
	}
	// The certificate last: with what is there before, a new key is no pair, and
	// is made again.
	f := In(dir)
	if err := writeFile(f.CA, ca.PEM, 0o644); err != nil {
		return true, err
	}
	if err := writeFile(f.Key, keyPEM, 0o600); err != nil {
		return true, err
	}
	return true, writeFile(f.Cert, certPEM, 0o644)
}

func (ca *CA) good(dir string, names []string, addrs []netip.Addr) bool {
	f := In(dir)
	if trusted, err := os.ReadFile(f.CA); err != nil || !bytes.Equal(trusted, ca.PEM) {
		return false
	}
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key) // which compares them
	if err != nil {
		return false
	}
	cert := pair.Leaf
	if cert.CheckSignatureFrom(ca.cert) != nil || time.Until(cert.NotAfter) < renewTime {
		return false
	}
	for _, n := range names {
		if cert.VerifyHostname(n) != nil {
			return false
		}
	}
	for _, a := range addrs {
		if cert.VerifyHostname(a.String()) != nil {
			return false
		}
	}
	return true
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail on Linux
	}
	return n
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseCert(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("it holds no certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}
