package doctor

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"ingot/internal/pool"
)

// written is about when this was: no right clock shows less.
var written = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const unsynchronised = 5 // TIME_ERROR of adjtimex(2)

func lookClock(_ context.Context, p Patient) Finding {
	now := time.Now().UTC()
	const breaks = "certificates are not valid yet, or no longer: no service talks to another"
	if now.Before(written) || now.Year() > written.Year()+50 {
		return fail("it shows "+now.Format(time.DateTime)+" UTC, which cannot be", breaks, "date -s, then hwclock --systohc")
	}
	if ca, ok := certificate(p.CA); ok {
		shows := "it shows " + now.Format(time.DateTime) + " UTC, and the environment's CA is valid "
		if now.Before(ca.NotBefore) {
			return fail(shows+"from "+ca.NotBefore.Format(time.DateTime)+" on", breaks, "set it: date -s, then hwclock --systohc")
		}
		if now.After(ca.NotAfter) {
			return fail(shows+"until "+ca.NotAfter.Format(time.DateTime), breaks, "set it (date -s); or, if it is right: `ingot down`, `ingot up`")
		}
	}
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return unseen(err)
	}
	if state != unsynchronised && t.Status&unix.STA_UNSYNC == 0 {
		return pass("synchronised")
	}
	f := warn("nothing keeps it right: it is not synchronised", "it drifts, until certificates and leases end too early or too late", "apt-get install chrony")
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		f.Fix = "run an NTP client: apt-get install chrony, then start chronyd; in a container, where that runs"
		return f
	}
	if timedatectl, err := pool.Tool("timedatectl", "systemd"); err == nil && timesyncd() {
		f.Fix = "timedatectl set-ntp true"
		return f.mendedBy(func(ctx context.Context) error { return do(ctx, timedatectl, "set-ntp", "true") })
	}
	return f.mendedBy(func(ctx context.Context) error { return do(ctx, "apt-get", "install", "-y", "chrony") })
}

func timesyncd() bool {
	found, _ := filepath.Glob("/lib/systemd/system/systemd-timesyncd.service")
	return len(found) > 0
}

func certificate(path string) (*x509.Certificate, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, false
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, false
	}
	c, err := x509.ParseCertificate(block.Bytes)
	return c, err == nil
}

const (
	maxInstances = "/proc/sys/fs/inotify/max_user_instances"
	maxWatches   = "/proc/sys/fs/inotify/max_user_watches"
	// A host has one instance that keeps logs short, and one for each log that is
	// being followed.
	fewInstances  = 32
	leastInstance = 8
	fewWatches    = 1024
)

func lookInotify(_ context.Context, p Patient) Finding {
	limit, watches := number(maxInstances), number(maxWatches)
	if limit < 0 || watches < 0 {
		return warn("this kernel has no inotify", "logs are not followed, nor kept short", "use a kernel with CONFIG_INOTIFY_USER")
	}
	left := limit - instances()
	if left >= fewInstances && watches >= fewWatches {
		return pass(fmt.Sprintf("%d of %d instances are left", left, limit))
	}
	f := warn(fmt.Sprintf("%d of %d instances are left, and %d watches are allowed", max(0, left), limit, watches), "logs are not followed, nor kept short",
		fmt.Sprintf("sysctl fs.inotify.max_user_instances=%d fs.inotify.max_user_watches=65536, and in /etc/sysctl.d for good", limit+512))
	if left < leastInstance && !p.running() {
		f.Status, f.Breaks = Fail, "hosts do not start: each watches its logs"
	}
	return f.mendedBy(func(context.Context) error {
		if err := raise(maxInstances, limit+512); err != nil {
			return err
		}
		return raise(maxWatches, 65536)
	})
}

// instances counts this user's, which share the limit.
func instances() int64 {
	var n int64
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		if target, _ := os.Readlink(file); target != "anon_inode:inotify" {
			continue
		}
		var s unix.Stat_t
		if unix.Stat(filepath.Dir(filepath.Dir(file)), &s) == nil && int(s.Uid) == os.Getuid() {
			n++
		}
	}
	return n
}
