package pki_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ingot/internal/pki"
)

// lines is a log that may be written and read at the same time.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// served are credentials that are kept while the test runs.
func served(t *testing.T, files pki.Files) (*tls.Config, *lines) {
	t.Helper()
	log := &lines{}
	c, err := files.Open(slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
	return c.Config(), log
}

func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !so(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("wait for %s: no", what)
		}
	}
}

// watched waits until the kernel watches something for this process: a change before
// that would be found by itself.
func watched(t *testing.T) {
	t.Helper()
	until(t, "the watch", func() bool {
		files, _ := filepath.Glob("/proc/self/fdinfo/*")
		return slices.ContainsFunc(files, func(path string) bool {
			b, _ := os.ReadFile(path)
			return bytes.Contains(b, []byte("inotify wd:"))
		})
	})
}

func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.pem", "key.pem", "cert.pem"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestChangedFiles changes certificate, key and CA in the ways in which people and
// programs do: afterwards clients of the new CA get in, and those of the old one do not.
func TestChangedFiles(t *testing.T) {
	var old, other, client, later string
	old, other, client, later = t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	before, after := authority(t, t.TempDir()), authority(t, t.TempDir())
	ensure(t, before, old, local)
	ensure(t, after, other, local)
	ensure(t, before, client, nil)
	ensure(t, after, later, nil)
	rename := func(t *testing.T, from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	link := func(t *testing.T, target, name string) {
		t.Helper()
		if err := errors.Join(os.Symlink(target, name+".new"), os.Rename(name+".new", name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		in     string // where the server looks, in its directory
		before func(t *testing.T, dir string)
		change func(t *testing.T, dir string, log *lines)
	}{
		"made anew": {
			in: "pki", before: func(t *testing.T, dir string) { copyFiles(t, old, dir+"/pki") },
			change: func(t *testing.T, dir string, _ *lines) { ensure(t, after, dir+"/pki", local) },
		},
		"written over": {
			in: "pki", before: func(t *testing.T, dir string) { copyFiles(t, old, dir+"/pki") },
			change: func(t *testing.T, dir string, _ *lines) { copyFiles(t, other, dir+"/pki") },
		},
		"links, as Kubernetes has them": {
			in: "pki", before: func(t *testing.T, dir string) {
				copyFiles(t, old, dir+"/pki/..1")
				copyFiles(t, other, dir+"/pki/..2")
				link(t, "..1", dir+"/pki/..data")
				for _, f := range []string{"ca.pem", "key.pem", "cert.pem"} {
					link(t, "..data/"+f, dir+"/pki/"+f)
				}
			},
			change: func(t *testing.T, dir string, _ *lines) { link(t, "..2", dir+"/pki/..data") },
		},
		"a directory that is a link": {
			in: "now/pki", before: func(t *testing.T, dir string) {
				copyFiles(t, old, dir+"/1/pki")
				copyFiles(t, other, dir+"/2/pki")
				link(t, "1", dir+"/now")
			},
			change: func(t *testing.T, dir string, _ *lines) { link(t, dir+"/2", dir+"/now") },
		},
		"a directory that goes and comes": {
			in: "a/pki", before: func(t *testing.T, dir string) { copyFiles(t, old, dir+"/a/pki") },
			change: func(t *testing.T, dir string, log *lines) {
				if err := os.RemoveAll(dir + "/a"); err != nil {
					t.Fatal(err)
				}
				until(t, "it to be missed", func() bool { return log.count("the old ones stay in force") > 0 })
				copyFiles(t, other, dir+"/b/pki")
				rename(t, dir+"/b", dir+"/a")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.before(t, dir)
			config, log := served(t, pki.In(filepath.Join(dir, c.in)))
			if err := shake(t, config, pki.In(client)); err != nil {
				t.Fatalf("before: %v", err)
			}
			watched(t)
			c.change(t, dir, log)
			until(t, "the new certificates", func() bool { return log.count("the new ones are in force") == 1 })
			if err := shake(t, config, pki.In(later)); err != nil {
				t.Errorf("a client of the new CA: %v", err)
			}
			asOld := pki.In(client)
			asOld.CA = pki.In(later).CA
			if err := shake(t, config, asOld); err == nil {
				t.Error("a client of the old CA got in")
			}
		})
	}
}

// TestBadChanges: what can't be used is said once, and what was before stays in force.
func TestBadChanges(t *testing.T) {
	ca := authority(t, t.TempDir())
	client, other := t.TempDir(), t.TempDir()
	ensure(t, ca, client, nil)
	ensure(t, ca, other, local)
	key, err := os.ReadFile(other + "/key.pem")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file string
		data []byte
	}{{"cert.pem", nil}, {"cert.pem", []byte("garbage")}, {"key.pem", key}, {"ca.pem", []byte("none")}} {
		dir := t.TempDir()
		ensure(t, ca, dir, local)
		good, err := os.ReadFile(filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		config, log := served(t, pki.In(dir))
		watched(t)
		if err := os.WriteFile(filepath.Join(dir, c.file), c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		until(t, "a warning of "+c.file, func() bool { return log.count("the old ones stay in force") == 1 })
		if err := os.WriteFile(filepath.Join(dir, "another"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := shake(t, config, pki.In(client)); err != nil {
			t.Errorf("with a bad %s: %v", c.file, err)
		}
		if err := os.WriteFile(filepath.Join(dir, c.file), good, 0o600); err != nil {
			t.Fatal(err)
		}
		until(t, c.file+" to be good again", func() bool { return log.count("the new ones are in force") == 1 })
		if n := log.count("level="); n != 2 {
			t.Errorf("%s: %d lines, also for what has nothing to do with it", c.file, n)
		}
		if err := shake(t, config, pki.In(client)); err != nil {
			t.Errorf("good again: %v", err)
		}
	}
}

func TestOpenCredentials(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	ensure(t, authority(t, t.TempDir()), dir, local)
	ensure(t, authority(t, t.TempDir()), other, local)
	good := pki.In(dir)
	for want, f := range map[string]pki.Files{
		"read certificate: open ":            {Cert: dir + "/none", Key: good.Key},
		"read key: open ":                    {Cert: good.Cert, Key: dir + "/none"},
		"read certificate authority: open ":  {Cert: good.Cert, Key: good.Key, CA: dir + "/none"},
		"holds no certificate":               {Cert: good.Cert, Key: good.Key, CA: good.Key},
		"private key does not match public ": {Cert: good.Cert, Key: other + "/key.pem"},
	} {
		if _, err := f.Open(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
