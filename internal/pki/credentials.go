package pki

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Credentials are what a server shows and whom it trusts: files, read again whenever
// one of them changes. What can't be used changes nothing.
type Credentials struct {
	files Files
	log   *slog.Logger
	now   atomic.Pointer[tls.Config]
	tried [sha256.Size]byte // what the files were when they were last read
}

// Open reads the files. Run reads them again.
func (f Files) Open(log *slog.Logger) (*Credentials, error) {
	c := &Credentials{files: f, log: log}
	config, sum, err := f.read()
	if err != nil {
		return nil, err
	}
	c.tried = sum
	c.now.Store(config)
	return c, nil
}

// Config is TLS 1.3 with what the files are at each handshake. If there is a CA, clients
// must have a certificate of it.
func (c *Credentials) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.now.Load(), nil },
	}
}

// read reads all files. The sum is of their contents, or of the error by which one
// could not be read.
func (f Files) read() (*tls.Config, [sha256.Size]byte, error) {
	files := []struct{ what, path string }{{"certificate", f.Cert}, {"key", f.Key}, {"certificate authority", f.CA}}
	var contents [3][]byte
	for i, file := range files {
		if file.path == "" && i == 2 {
			continue
		}
		b, err := os.ReadFile(file.path)
		if err != nil {
			err = fmt.Errorf("read %s: %w", file.what, err)
			return nil, sha256.Sum256([]byte(err.Error())), err
		}
		contents[i] = b
	}
	config, err := f.server(contents[0], contents[1], contents[2])
	return config, sha256.Sum256(bytes.Join(contents[:], []byte{0})), err
}

func (f Files) server(cert, key, ca []byte) (*tls.Config, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("read certificate %s and key %s: %w", f.Cert, f.Key, err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}}
	if f.CA == "" {
		return c, nil
	}
	c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("read certificate authority: %s holds no certificate", f.CA)
	}
	return c, nil
}

// A certificate and its key are two files: they are read when nothing has happened for
// a moment, or after a while in a directory where something always does.
const (
	settle  = 100 * time.Millisecond
	busyFor = time.Second
)

// Run reads the files again when they change, which the kernel says, until ctx ends.
func (c *Credentials) Run(ctx context.Context) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch certificates: %w", err)
	}
	changes := os.NewFile(uintptr(fd), "inotify")
	defer changes.Close()
	stop := context.AfterFunc(ctx, func() { changes.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for events := make([]byte, 16<<10); ctx.Err() == nil; {
		if err := c.watch(changes); err != nil {
			return err
		}
		c.again()
		if _, err := changes.Read(events); err != nil && ctx.Err() == nil {
			return fmt.Errorf("watch certificates: %w", err)
		}
		for end := time.Now().Add(busyFor); ctx.Err() == nil && time.Now().Before(end); {
			changes.SetReadDeadline(time.Now().Add(settle))
			if _, err := changes.Read(events); err != nil {
				break
			}
		}
		changes.SetReadDeadline(time.Time{})
	}
	return nil
}

// again takes the files as they are now.
func (c *Credentials) again() {
	config, sum, err := c.files.read()
	if sum == c.tried {
		return
	}
	c.tried = sum
	if err != nil {
		c.log.Warn("the certificates have changed and can't be used: the old ones stay in force", "err", err)
		return
	}
	c.now.Store(config)
	c.log.Info("the certificates have changed: the new ones are in force", "cert", c.files.Cert)
}

const changing = unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

// watch adds the directories of the files. To add one again is no harm.
func (c *Credentials) watch(changes *os.File) error {
	conn, err := changes.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch certificates: %w", err)
	}
	var problems error
	err = conn.Control(func(fd uintptr) {
		for _, path := range []string{c.files.Cert, c.files.Key, c.files.CA} {
			for dir := range places(path) {
				_, err := unix.InotifyAddWatch(int(fd), dir, changing)
				if err != nil && !errors.Is(err, unix.ENOENT) { // gone since: that is told above it
					problems = errors.Join(problems, fmt.Errorf("watch certificates in %s: %w", dir, err))
				}
			}
		}
	})
	return errors.Join(err, problems)
}

// places are the directories in which something changes when another file is found by
// the path: its own, that of each symbolic link on the way, and, of a directory that is
// not there, the one above it.
func places(path string) map[string]bool {
	dirs := map[string]bool{}
	var add func(path string, links int)
	add = func(path string, links int) {
		last := true
		for ; path != "" && path != "/" && path != "."; path = filepath.Dir(path) {
			info, err := os.Lstat(path)
			link := err == nil && info.Mode()&os.ModeSymlink != 0
			if last || link || err != nil {
				dirs[filepath.Dir(path)] = true
			}
			if target, err := os.Readlink(path); link && err == nil && links > 0 {
				if !filepath.IsAbs(target) {
					target = filepath.Join(filepath.Dir(path), target)
				}
				add(target, links-1)
			}
			last = false
		}
	}
	add(path, 40)
	return dirs
}
