package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// Files are a certificate, its key, and the CA whose peers it trusts.
type Files struct {
	CA, Cert, Key string
}

// In names the files that Ensure keeps in a directory.
func In(dir string) Files {
	return Files{CA: dir + "/ca.pem", Cert: dir + "/cert.pem", Key: dir + "/key.pem"}
}

// Client is TLS 1.3 with servers of the CA; a certificate, if there is one, says
// who we are.
func (f Files) Client() (*tls.Config, error) {
	pool, err := pool(f.CA)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool}
	if f.Cert != "" {
		cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, fmt.Errorf("read certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

func pool(file string) (*x509.CertPool, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read certificate authority: %s holds no certificate", file)
	}
	return pool, nil
}
