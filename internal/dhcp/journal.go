package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// journal is the lease log on disk. One goroutine writes it; all that came while
// it was writing goes into the next write, with one fdatasync for all.
type journal struct {
	path    string
	file    *os.File
	size    int64
	live    int64 // of the last compaction
	entries chan entry
	stopped chan struct{} // closed once nothing is written any more
	// content returns the whole log as it should be, for a compaction.
	content func() []byte
}

// entry is one change. done is called once it is on disk, or can't be.
type entry struct {
	text    []byte
	compact bool // scripts must not see what came before
	done    func(error)
}

const (
	maxBatch = 1024
	// The log is compacted once it is this much larger than what lives in it.
	slack = 64 << 10
)

func openJournal(path string, content func() []byte) (*journal, error) {
	j := &journal{path: path, entries: make(chan entry, maxBatch), stopped: make(chan struct{}), content: content}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("open lease log: %w", err)
	}
	return j, j.compact()
}

func (j *journal) append(e entry) {
	select {
	case j.entries <- e:
	case <-j.stopped:
		e.done(fmt.Errorf("write lease log: the server has ended: %w", errdefs.ErrUnavailable))
	}
}

func (j *journal) run(ctx context.Context) error {
	defer j.file.Close()
	defer close(j.stopped)
	batch := make([]entry, 0, maxBatch)
	var text bytes.Buffer
	for {
		batch = batch[:0]
		select {
		case e := <-j.entries:
			batch = append(batch, e)
		case <-ctx.Done():
			return nil
		}
		for more := true; more && len(batch) < maxBatch; {
			select {
			case e := <-j.entries:
				batch = append(batch, e)
			default:
				more = false
			}
		}
		text.Reset()
		compact := false
		for _, e := range batch {
			text.Write(e.text)
			compact = compact || e.compact
		}
		err := j.write(text.Bytes(), compact)
		for _, e := range batch {
			e.done(err)
		}
		if err != nil {
			return err
		}
	}
}

func (j *journal) write(text []byte, compact bool) error {
	if compact || j.size+int64(len(text)) > 4*j.live+slack {
		return j.compact()
	}
	n, err := j.file.Write(text)
	j.size += int64(n)
	if err == nil {
		err = unix.Fdatasync(int(j.file.Fd()))
	}
	if err != nil {
		return fmt.Errorf("write lease log %s: %w", j.path, err)
	}
	return nil
}

// compact replaces the log by what lives in it, in one step.
func (j *journal) compact() error {
	text := j.content()
	f, err := os.OpenFile(j.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("compact lease log: %w", err)
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync()); err == nil {
		err = os.Rename(f.Name(), j.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(j.path))
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("compact lease log: %w", err)
	}
	if j.file != nil {
		j.file.Close()
	}
	j.file, j.size, j.live = f, int64(len(text)), int64(len(text))
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

const header = "# The leases of ingot's DHCP server, in the form of dhcpd.leases(5).\n# Times are UTC. The last entry of an address is the true one.\n\n"

// dateForm is dhcpd's: the day of the week (0 is Sunday), then date and time in UTC.
func formatDate(t time.Time) string {
	t = t.UTC()
	return fmt.Sprintf("%d %s", t.Weekday(), t.Format("2006/01/02 15:04:05"))
}

func formatLease(l Lease) []byte {
	var b bytes.Buffer
	state := "active"
	if l.State != Active {
		state = "free"
	}
	fmt.Fprintf(&b, "lease %s {\n  starts %s;\n  ends %s;\n  binding state %s;\n  hardware ethernet %s;\n",
		l.IP, formatDate(l.Starts), formatDate(l.Ends), state, l.MAC)
	if len(l.ClientID) > 0 {
		fmt.Fprintf(&b, "  uid %s;\n", quote(string(l.ClientID)))
	}
	if l.Hostname != "" {
		fmt.Fprintf(&b, "  client-hostname %s;\n", quote(l.Hostname))
	}
	b.WriteString("}\n")
	return b.Bytes()
}

func formatReservation(mac net.HardwareAddr, ip netip.Addr) []byte {
	return fmt.Appendf(nil, "host %s {\n  dynamic;\n  hardware ethernet %s;\n  fixed-address %s;\n}\n",
		strings.ReplaceAll(mac.String(), ":", "-"), mac, ip)
}

// quote writes text as dhcpd does: what is not plain becomes an octal escape.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		c := s[i]
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			fmt.Fprintf(&b, "\\%03o", c)
		} else {
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// book is what a log says: the newest entry of each address.
type book struct {
	leases   map[netip.Addr]Lease
	reserved map[string]netip.Addr
}

func readBook(path string) (book, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return book{leases: map[netip.Addr]Lease{}, reserved: map[string]netip.Addr{}}, nil
	}
	if err != nil {
		return book{}, fmt.Errorf("read lease log: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return book{}, fmt.Errorf("read lease log: %w", err)
	}
	return parseBook(string(text)), nil
}

// ReadLeases reads a lease log, also another server's: the newest entry of each
// address. What it can't understand it passes over, as a torn last entry.
func ReadLeases(path string) ([]Lease, error) {
	b, err := readBook(path)
	if err != nil {
		return nil, err
	}
	s := &Server{c: Config{Now: time.Now}, leases: map[netip.Addr]*Lease{}, byMAC: map[string]*Lease{}}
	for _, l := range b.leases {
		s.put(&l)
	}
	return s.Leases(), nil
}

// parseBook reads `lease ADDRESS { … }` and `host NAME { … }`. An entry counts
// once its closing brace is there.
func parseBook(text string) book {
	b := book{leases: map[netip.Addr]Lease{}, reserved: map[string]netip.Addr{}}
	t := tokens{rest: text}
	for {
		word := t.next()
		switch word {
		case "":
			return b
		case "lease", "host":
		default:
			continue
		}
		name := t.next()
		if t.next() != "{" {
			continue
		}
		fields, whole := t.block()
		if !whole {
			return b
		}
		mac, err := net.ParseMAC(fields["hardware ethernet"])
		if err != nil || len(mac) != 6 {
			continue
		}
		if word == "host" {
			if ip, err := netip.ParseAddr(fields["fixed-address"]); err == nil {
				b.reserved[string(mac)] = ip
			}
			continue
		}
		ip, err := netip.ParseAddr(name)
		if err != nil || !ip.Is4() {
			continue
		}
		l := Lease{IP: ip, MAC: mac, ClientID: []byte(fields["uid"]), Hostname: fields["client-hostname"], State: Active}
		l.Starts, l.Ends = parseDate(fields["starts"]), parseDate(fields["ends"])
		if fields["ends"] == "never" {
			l.Ends = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
		}
		if state := fields["binding state"]; state != "" && state != "active" {
			l.State = Released
		}
		b.leases[ip] = l
	}
}

func parseDate(s string) time.Time {
	_, date, _ := strings.Cut(s, " ")
	t, err := time.ParseInLocation("2006/01/02 15:04:05", date, time.UTC)
	if err != nil {
		return time.Time{}
	}
	return t
}

// tokens splits dhcpd's syntax: words, "strings", and ; { } by themselves.
type tokens struct {
	rest   string
	quoted bool // the last token was a string
}

func (t *tokens) next() string {
	t.quoted = false
	for {
		t.rest = strings.TrimLeft(t.rest, " \t\r\n")
		if !strings.HasPrefix(t.rest, "#") {
			break
		}
		_, t.rest, _ = strings.Cut(t.rest, "\n")
	}
	if t.rest == "" {
		return ""
	}
	switch t.rest[0] {
	case '{', '}', ';':
		word := t.rest[:1]
		t.rest = t.rest[1:]
		return word
	case '"':
		return t.text()
	}
	end := strings.IndexAny(t.rest, " \t\r\n{};\"")
	if end < 0 {
		end = len(t.rest)
	}
	word := t.rest[:end]
	t.rest = t.rest[end:]
	return word
}

func (t *tokens) text() string {
	t.quoted = true
	var b strings.Builder
	s := t.rest[1:]
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			t.rest = s[i+1:]
			return b.String()
		case s[i] == '\\' && i+3 < len(s) && octal(s[i+1:i+4]):
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(s[i])
		}
	}
	t.rest = "" // torn
	return b.String()
}

func octal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '7' {
			return false
		}
	}
	return s[0] <= '3'
}

// block reads statements up to the closing brace. A statement's key is its first
// word, or two where the second tells the kind: `hardware ethernet`, `binding state`.
func (t *tokens) block() (fields map[string]string, whole bool) {
	fields = map[string]string{}
	var words []string
	depth := 0
	for {
		word := t.next()
		plain := !t.quoted
		switch {
		case word == "" && plain:
			return fields, false
		case word == "{" && plain:
			depth++
		case word == "}" && plain:
			if depth == 0 {
				return fields, true
			}
			depth--
		case word == ";" && plain:
			if depth == 0 {
				key, value := statement(words)
				fields[key] = value
			}
			words = words[:0]
		default:
			words = append(words, word)
		}
	}
}

func statement(words []string) (key, value string) {
	if len(words) == 0 {
		return "", ""
	}
	n := 1
	if len(words) > 2 && (words[0] == "hardware" || words[0] == "binding") {
		n = 2
	}
	return strings.Join(words[:n], " "), strings.Join(words[n:], " ")
}
