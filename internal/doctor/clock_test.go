package doctor_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/doctor"
)

func authority(t *testing.T, from, to time.Time) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: to, IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestClock(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		from, to time.Duration
		fails    bool
	}{{-time.Hour, time.Hour, false}, {time.Hour, 2 * time.Hour, true}, {-2 * time.Hour, -time.Hour, true}} {
		f := look(t, "clock", doctor.Patient{CA: authority(t, now.Add(c.from), now.Add(c.to))})
		if (f.Status == doctor.Fail) != c.fails {
			t.Errorf("with a CA from %s to %s: %s: %s", c.from, c.to, f.Status, f.Detail)
		}
	}
	// The kernel's own answer, whatever it is.
	var x unix.Timex
	state, err := unix.Adjtimex(&x)
	if err != nil {
		t.Fatal(err)
	}
	f := look(t, "clock", doctor.Patient{})
	if synchronised := state != 5; synchronised != (f.Status == doctor.Pass) {
		t.Errorf("adjtimex says %d, the check %s: %s", state, f.Status, f.Detail)
	}
}

// The limit is one of the whole machine, so that the check is shown another.
func TestInotify(t *testing.T) {
	needs(t)
	const limit = "/proc/sys/fs/inotify/max_user_instances"
	shown := filepath.Join(t.TempDir(), "limit")
	if err := os.WriteFile(shown, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mount(t, shown, limit, "", unix.MS_BIND, "")
	watches := filepath.Join(t.TempDir(), "watches")
	if err := os.WriteFile(watches, []byte("8192\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mount(t, watches, "/proc/sys/fs/inotify/max_user_watches", "", unix.MS_BIND, "")
	for range 2 {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	p := doctor.Patient{Device: "ingot-nosuch"}
	f := expect(t, "inotify", p, doctor.Fail, "0 of 1 instances are left")
	mend(t, f, p)
	if b, _ := os.ReadFile(shown); strings.TrimSpace(string(b)) != "513" {
		t.Errorf("the limit is %s", b)
	}
}
