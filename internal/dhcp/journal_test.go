package dhcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// journalOf runs a journal over a content that the test changes.
func journalOf(t *testing.T, content func(io.Writer) error) (*journal, func() error) {
	t.Helper()
	j, err := openJournal(filepath.Join(t.TempDir(), "dir", "dhcpd.leases"), false, content)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- j.run(ctx) }()
	var once sync.Once
	stop := func() (err error) {
		once.Do(func() {
			cancel()
			err = <-ended
		})
		return err
	}
	t.Cleanup(func() { stop() })
	return j, stop
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Everything that was logged is in the log, whatever compactions run meanwhile.
func TestJournalKeepsAllThroughCompactions(t *testing.T) {
	var mu sync.Mutex
	var lines []string
	j, stop := journalOf(t, func(w io.Writer) error {
		mu.Lock()
		all := strings.Join(lines, "")
		mu.Unlock()
		time.Sleep(time.Millisecond) // changes come while it is written
		_, err := io.WriteString(w, header+all)
		return err
	})
	var group sync.WaitGroup
	for g := range 4 {
		group.Go(func() {
			for i := range 200 {
				line := fmt.Sprintf("# %d-%d\n", g, i)
				mu.Lock()
				lines = append(lines, line)
				mu.Unlock()
				j.put([]byte(line), nil, change{renewed: true, urgent: i%10 == 0})
				j.pace()
				if i%50 == 0 {
					if err := j.order([]byte("# replace\n"), true)(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	text := read(t, j.path)
	for _, line := range lines {
		if !strings.Contains(text, line) {
			t.Errorf("lost: %s", line)
		}
	}
}

func TestReplaceLeavesNothingOld(t *testing.T) {
	j, _ := journalOf(t, func(w io.Writer) error { _, err := io.WriteString(w, "# all that is true\n"); return err })
	j.put([]byte("# old\n"), nil, change{})
	if err := j.order([]byte("# newer\n"), true)(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, j.path); got != "# all that is true\n" {
		t.Errorf("got %q", got)
	}
}

func TestRenewalsAreCompactedSoon(t *testing.T) {
	j, _ := journalOf(t, func(w io.Writer) error { _, err := io.WriteString(w, "# true\n"); return err })
	j.put([]byte("# older end\n"), nil, change{renewed: true})
	eventually(t, "the older entry is gone", func() bool { return read(t, j.path) == "# true\n" })
}

// A disk that can't take a new log leaves the old one, and the server goes on.
func TestFailedCompactionKeepsTheLog(t *testing.T) {
	broken := errors.New("broken")
	var mu sync.Mutex
	var fails error
	j, stop := journalOf(t, func(io.Writer) error {
		mu.Lock()
		defer mu.Unlock()
		return fails
	})
	mu.Lock()
	fails = broken
	mu.Unlock()
	if err := j.order([]byte("# one\n"), true)(); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	j.put([]byte("# two\n"), nil, change{})
	eventually(t, "what comes later is written", func() bool { return read(t, j.path) == "# one\n# two\n" })
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestReplyLeavesAfterTheWrite(t *testing.T) {
	j, err := openJournal(filepath.Join(t.TempDir(), "dhcpd.leases"), false, func(io.Writer) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	var seen string
	done := make(chan bool)
	j.sent = func(r []*reply) {
		if len(r) > 0 {
			seen = read(t, j.path)
			close(done)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- j.run(ctx) }()
	j.put([]byte("# first\n"), &reply{}, change{})
	<-done
	cancel()
	if err := <-ended; err != nil || seen != "# first\n" {
		t.Errorf("when the answer left, the log was %q, %v", seen, err)
	}
}

// On a full disk nobody is answered, whoever waits is told, and all is written once there is
// room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	sh(t, "mount -t tmpfs -o size=32k tmpfs "+dir)
	t.Cleanup(func() { sh(t, "umount "+dir) })
	j, err := openJournal(filepath.Join(dir, "dhcpd.leases"), false, func(w io.Writer) error { _, err := io.WriteString(w, header); return err })
	if err != nil {
		t.Fatal(err)
	}
	sent, full := make(chan int, 16), make(chan error, 16)
	j.sent = func(all []*reply) {
		n := 0
		for _, r := range all {
			n += len(r.b)
		}
		sent <- n
	}
	j.full = func(err error) { full <- err }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- j.run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	filler := filepath.Join(dir, "filler")
	sh(t, "cat /dev/zero >"+filler+" 2>/dev/null || true")
	long := strings.Repeat("# a line that the log's last page has no room for\n", 200)
	j.put([]byte(long), &reply{b: []byte("ack")}, change{})
	if err := <-full; !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("it says %v", err)
	}
	if err := j.order([]byte("# meanwhile\n"), false)(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("who waits is told %v", err)
	}
	if got := read(t, j.path); got != header {
		t.Errorf("the log has %d bytes of it", len(got)-len(header))
	}
	select {
	case <-sent:
		t.Error("the client was answered")
	default:
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if n := <-sent; n != 0 {
		t.Error("the client was answered late")
	}
	if err := j.order([]byte("# later\n"), false)(); err != nil {
		t.Error(err)
	}
	for err := range full {
		if err == nil { // it has said so again until there was room
			break
		}
	}
	if got := read(t, j.path); got != header+long+"# meanwhile\n# later\n" {
		t.Errorf("the log is %q", got)
	}
	j.put([]byte("# ack\n"), &reply{b: []byte("ack")}, change{})
	for n := range sent {
		if n == 3 {
			return
		}
	}
}

// What changes the table at the same time is in the log in the table's order.
func TestLogHasTheTablesOrder(t *testing.T) {
	s, _ := table(t, nil)
	s.log, _ = journalOf(t, func(w io.Writer) error { _, err := io.WriteString(w, header); return err })
	ip := a("192.168.10.50")
	for round := range 200 {
		var group sync.WaitGroup
		for n := range byte(64) {
			group.Go(func() {
				if n%2 == 0 {
					s.Reserve(Reservation{MAC: mac(n), IP: ip})
				} else {
					s.Unreserve(Reservation{IP: ip})
				}
			})
		}
		group.Wait()
		onDisk := ""
		if b, err := readBook(s.log.path); err != nil {
			t.Fatal(err)
		} else if len(b.reserved) == 1 {
			onDisk = b.reserved[0].client()
		}
		inTable := ""
		if r := s.booked.byIP[from(ip)]; r != nil {
			inTable = r.client()
		}
		if onDisk != inTable {
			t.Fatalf("round %d: the table has it for %q, the log for %q", round, inTable, onDisk)
		}
	}
}

// A reservation that moves is not in the log twice.
func TestReservationMoves(t *testing.T) {
	s, _ := table(t, nil)
	s.log, _ = journalOf(t, func(w io.Writer) error { _, err := io.WriteString(w, header); return err })
	for _, ip := range []string{"192.168.10.50", "192.168.10.51"} {
		if _, err := s.Reserve(Reservation{MAC: mac(1), IP: a(ip)}); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := readBook(s.log.path); err != nil || len(b.reserved) != 1 || b.reserved[0].IP != a("192.168.10.51") {
		t.Errorf("on disk: %+v, %v", b.reserved, err)
	}
	if l := s.Leases(); len(l) != 1 || !l[0].Reserved || l[0].State != Reserved {
		t.Errorf("listed: %+v", l)
	}
	if got := ack(t, s, 1); got != "192.168.10.51" {
		t.Errorf("its client got %s", got)
	}
	if l := only(s, mac(1)); !l.Reserved || l.State != Active {
		t.Errorf("listed: %+v", l)
	}
	if err := s.Unreserve(Reservation{IP: a("192.168.10.51"), MAC: mac(2)}); !errdefs.IsNotFound(err) {
		t.Errorf("as another client's: %v", err)
	}
	if err := s.Unreserve(Reservation{}); !errdefs.IsNotFound(err) {
		t.Errorf("nobody's: %v", err)
	}
	if err := s.Unreserve(Reservation{MAC: mac(1)}); err != nil || only(s, mac(1)).Reserved {
		t.Errorf("by MAC: %v", err)
	}
	if b, err := readBook(s.log.path); err != nil || len(b.reserved) != 0 {
		t.Errorf("on disk: %+v, %v", b.reserved, err)
	}
}

// What a compaction that was killed has left goes, though the log needs none.
func TestOpenJournalRemovesHalfALog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dhcpd.leases")
	for file, text := range map[string]string{path: header, path + ".new": header + "lease 192."} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	j, err := openJournal(path, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer j.file.Close()
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a log is there: %v", err)
	}
	if got := read(t, path); got != header {
		t.Errorf("the log is %q", got)
	}
}
