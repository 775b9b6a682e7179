package dhcp

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// header begins a log of ours.
const header = "# The leases of ingot's DHCP server, in the form of dhcpd.leases(5).\n# Times are UTC. The last entry of an address is the true one.\n\n"

// never is the end of a lease without one, in a form that scripts can read.
var never = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)

// formatRecord appends a log entry. The order of its lines, and that MACs are in
// lower case, is what isc-dhcp-server's dhcp-lease-list asks for. That script
// does not look at the binding state: what has ended, ended a second ago, and
// what is put aside has no MAC, so that it shows neither.
func formatRecord(b []byte, r *record) []byte {
	b = append(b, "lease "...)
	b = r.ip.netip().AppendTo(b)
	b = append(b, " {\n  starts "...)
	b = appendDate(b, r.starts)
	b = append(b, ";\n  ends "...)
	b = appendDate(b, r.ends)
	b = append(b, ";\n  binding state "...)
	switch r.state {
	case stateActive:
		b = append(b, "active;\n"...)
	case stateDeclined:
		return append(b, "abandoned;\n}\n"...)
	default:
		b = append(b, "free;\n"...)
	}
	if r.mac != [6]byte{} {
		b = append(b, "  hardware ethernet "...)
		b = appendMAC(b, r.mac)
		b = append(b, ";\n"...)
	}
	if r.id != "" {
		b = append(b, "  uid "...)
		b = append(appendQuoted(b, r.id), ";\n"...)
	}
	if r.hostname != "" {
		b = append(b, "  client-hostname "...)
		b = append(appendQuoted(b, r.hostname), ";\n"...)
		if r.unnamed {
			b = append(b, noName...)
		}
	}
	return append(b, "}\n"...)
}

// noName is dhcpd's way to say that no name in the DNS is the lease's.
const noName = "  set ddns-fwd-name = \"\";\n"

// microVMVariable has the name of a microVM: dhcpd passes over variables that it does not know.
const microVMVariable = "ingot-microvm"

// appendDate writes dhcpd's form: the day of the week (0 is Sunday), then date
// and time in UTC.
func appendDate(b []byte, seconds int64) []byte {
	t := time.Unix(seconds, 0).UTC()
	if t.After(never) {
		t = never
	}
	b = append(b, '0'+byte(t.Weekday()), ' ')
	return t.AppendFormat(b, dateForm)
}

const dateForm = "2006/01/02 15:04:05"

func appendMAC(b []byte, mac [6]byte) []byte {
	for i, c := range mac {
		if i > 0 {
			b = append(b, ':')
		}
		b = hex.AppendEncode(b, []byte{c})
	}
	return b
}

// formatReservation appends a `host` block. The comment parts it from a lease
// before it for dhcp-lease-list, which splits the file at that word.
func formatReservation(b []byte, r Reservation) []byte {
	b = fmt.Appendf(b, "# no lease, but kept for one\nhost %s {\n  dynamic;\n", blockName(r))
	if len(r.MAC) == 6 {
		b = append(appendMAC(append(b, "  hardware ethernet "...), [6]byte(r.MAC)), ";\n"...)
	}
	if r.MicroVM != "" {
		b = append(appendQuoted(append(b, "  set "+microVMVariable+" = "...), r.MicroVM), ";\n"...)
	}
	if len(r.ClientID) > 0 {
		b = append(appendQuoted(append(b, "  uid "...), string(r.ClientID)), ";\n"...)
	}
	if r.Name != "" {
		b = append(appendQuoted(append(b, "  client-hostname "...), r.Name), ";\n"...)
	}
	return fmt.Appendf(b, "  fixed-address %s;\n}\n", r.IP)
}

// formatUnreserved appends the end of a reservation.
func formatUnreserved(b []byte, r Reservation) []byte {
	return fmt.Appendf(b, "host %s {\n  dynamic;\n  deleted;\n  fixed-address %s;\n}\n", blockName(r), r.IP)
}

func blockName(r Reservation) string { return "ip-" + strings.ReplaceAll(r.IP.String(), ".", "-") }

// appendQuoted writes text as dhcpd does: what is not plain becomes an octal
// escape. So does what would mislead scripts that know no strings: a semicolon,
// and the word that begins an entry.
func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for i := range len(s) {
		c := s[i]
		plain := c >= ' ' && c <= '~' && c != '"' && c != '\\' && c != ';'
		if !plain || c == 'l' && strings.HasPrefix(s[i:], "lease") {
			b = append(b, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		} else {
			b = append(b, c)
		}
	}
	return append(b, '"')
}

// book is what a log says: the newest entry of each address.
type book struct {
	leases   map[addr4]*record
	reserved []Reservation
	clean    bool // a log of ours that needs no rewriting
}

// readBook reads a log piece by piece: it may be much larger than what lives in it.
func readBook(path string) (book, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return newBookReader().finish(), nil
	}
	if err != nil {
		return book{}, fmt.Errorf("read lease log: %w", err)
	}
	defer f.Close()
	r := newBookReader()
	var text []byte
	piece := make([]byte, 256<<10)
	for {
		n, err := f.Read(piece)
		text = append(text, piece[:n]...)
		if errors.Is(err, io.EOF) {
			r.read(string(text))
			return r.finish(), nil
		}
		if err != nil {
			return book{}, fmt.Errorf("read lease log: %w", err)
		}
		if end := bytes.LastIndex(text, []byte("\n}\n")); end >= 0 {
			r.read(string(text[:end+3]))
			text = append(text[:0], text[end+3:]...)
		}
	}
}

// ReadLeases reads a lease log, also another server's: the newest entry of each
// address. What it can't understand it passes over, as a torn last entry.
func ReadLeases(path string) ([]Lease, error) {
	b, err := readBook(path)
	if err != nil {
		return nil, err
	}
	s := &Server{c: Config{Now: time.Now}}
	all := make([]Lease, 0, len(b.leases))
	for _, r := range b.leases {
		all = append(all, s.shown(r))
	}
	slices.SortFunc(all, func(a, b Lease) int { return a.IP.Compare(b.IP) })
	return all, nil
}

// ReadReservations reads the reservations of a lease log, as ReadLeases does the leases.
func ReadReservations(path string) ([]Reservation, error) {
	b, err := readBook(path)
	return b.reserved, err
}

// bookReader reads `lease ADDRESS { … }` and `host NAME { … }`. An entry counts
// once its closing brace is there.
type bookReader struct {
	book
	begun bool
	hosts map[addr4]Reservation
}

func newBookReader() *bookReader {
	return &bookReader{book: book{leases: map[addr4]*record{}}, hosts: map[addr4]Reservation{}}
}

func (b *bookReader) finish() book {
	for _, r := range b.hosts {
		b.reserved = append(b.reserved, r)
	}
	slices.SortFunc(b.reserved, func(x, y Reservation) int { return x.IP.Compare(y.IP) })
	return b.book
}

func (b *bookReader) read(text string) {
	if !b.begun {
		b.begun, b.clean = true, strings.HasPrefix(text, header)
	}
	t := tokens{rest: text}
	for {
		word := t.next()
		if word == "" && !t.quoted {
			b.clean = b.clean && (text == "" || strings.HasSuffix(text, "\n"))
			return
		}
		if word != "lease" && word != "host" {
			b.clean = false
			continue
		}
		start := t.rest
		name := t.next()
		brace := t.next()
		e, whole := t.entry()
		switch {
		case brace != "{" || !whole:
			b.clean, t.rest = false, start
		case word == "host":
			b.host(e)
		default:
			b.lease(name, e)
		}
	}
}

func (b *bookReader) host(e logEntry) {
	ip, err := netip.ParseAddr(e.address)
	switch {
	case err != nil || from(ip) == 0:
		b.clean = false
	case e.deleted:
		b.clean = false
		delete(b.hosts, from(ip))
	case e.mac != [6]byte{} || e.microVM != "" || e.id != "" || e.hostname != "":
		b.hosts[from(ip)] = e.reservation(ip)
	}
}

func (b *bookReader) lease(name string, e logEntry) {
	ip, err := netip.ParseAddr(name)
	if err != nil || from(ip) == 0 || e.mac == [6]byte{} && e.state != stateDeclined {
		b.clean = false
		return
	}
	r := &record{
		ip: from(ip), mac: e.mac, id: strings.Clone(e.id), hostname: strings.Clone(e.hostname), // not the whole text
		starts: e.starts, ends: e.ends, state: e.state, place: nowhere, logged: true, unnamed: e.unnamed && e.hostname != "",
	}
	if b.leases[r.ip] != nil {
		b.clean = false
	}
	b.leases[r.ip] = r
}

// logEntry is what one block of a log says.
type logEntry struct {
	starts, ends int64
	mac          [6]byte
	id, hostname string
	microVM      string
	address      string
	state        state
	deleted      bool
	unnamed      bool
}

func (e logEntry) reservation(ip netip.Addr) Reservation {
	r := Reservation{IP: ip, MicroVM: e.microVM, ClientID: []byte(e.id), Name: e.hostname}
	if e.mac != [6]byte{} {
		r.MAC = net.HardwareAddr(e.mac[:])
	}
	return r
}

// entry reads statements up to the closing brace. A torn entry ends where the
// next one begins.
func (t *tokens) entry() (e logEntry, whole bool) {
	var words [6]string
	n, depth := 0, 0
	for {
		word := t.next()
		plain := !t.quoted
		switch {
		case word == "" && plain:
			return e, false
		case word == "{" && plain:
			if n == 2 && depth == 0 && (words[0] == "lease" || words[0] == "host") {
				return e, false
			}
			depth++
			n = 0
		case word == "}" && plain:
			if depth == 0 {
				return e, n == 0
			}
			depth--
			n = 0
		case word == ";" && plain:
			if depth == 0 {
				e.set(words[:n])
			}
			n = 0
		case n < len(words):
			words[n] = word
			n++
		}
	}
}

// set takes one statement. What it does not know it passes over.
func (e *logEntry) set(words []string) {
	switch {
	case len(words) == 1 && words[0] == "deleted":
		e.deleted = true
	case len(words) < 2:
	case words[0] == "starts":
		e.starts = parseDate(words[1:])
	case words[0] == "ends":
		e.ends = parseDate(words[1:])
	case words[0] == "hardware" && words[1] == "ethernet" && len(words) == 3:
		if mac, err := net.ParseMAC(words[2]); err == nil && len(mac) == 6 {
			e.mac = [6]byte(mac)
		}
	case words[0] == "binding" && words[1] == "state" && len(words) == 3:
		switch words[2] {
		case "active":
			e.state = stateActive
		case "abandoned":
			e.state = stateDeclined
		default:
			e.state = stateReleased
		}
	case words[0] == "set" && words[1] == "ddns-fwd-name":
		e.unnamed = len(words) == 4 && words[3] == ""
	case words[0] == "set" && words[1] == microVMVariable && len(words) == 4:
		e.microVM = words[3]
	case words[0] == "uid":
		e.id = words[1]
	case words[0] == "client-hostname":
		e.hostname = words[1]
	case words[0] == "fixed-address":
		e.address = words[1]
	}
}

// parseDate reads dhcpd's dates: `4 2022/10/28 10:11:02`, `epoch 1666951862`, `never`.
func parseDate(words []string) int64 {
	switch {
	case words[0] == "never":
		return never.Unix()
	case words[0] == "epoch" && len(words) > 1:
		n, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return 0
		}
		return min(max(n, 0), never.Unix())
	case len(words) < 3 || len(words[1]) != 10 || len(words[2]) != 8:
		return 0
	}
	date, clock := words[1], words[2]
	number := func(s string) int {
		n := 0
		for i := range len(s) {
			if s[i] < '0' || s[i] > '9' {
				return 0
			}
			n = 10*n + int(s[i]-'0')
		}
		return n
	}
	t := time.Date(number(date[:4]), time.Month(number(date[5:7])), number(date[8:]),
		number(clock[:2]), number(clock[3:5]), number(clock[6:]), 0, time.UTC)
	return max(t.Unix(), 0)
}

// tokens splits dhcpd's syntax: words, "strings", and ; { } , by themselves.
type tokens struct {
	rest   string
	quoted bool // the last token was a string
}

func (t *tokens) next() string {
	t.quoted = false
	s := t.rest
	for {
		for len(s) > 0 && (s[0] == ' ' || s[0] == '\n' || s[0] == '\t' || s[0] == '\r' || s[0] == 0) {
			s = s[1:]
		}
		if len(s) == 0 || s[0] != '#' {
			break
		}
		_, s, _ = strings.Cut(s, "\n")
	}
	t.rest = s
	if s == "" {
		return ""
	}
	switch s[0] {
	case '{', '}', ';', ',':
		t.rest = s[1:]
		return s[:1]
	case '"':
		return t.text()
	}
	end := 0
	for end < len(s) && !separates[s[end]] {
		end++
	}
	t.rest = s[end:]
	return s[:end]
}

// separates ends a word.
var separates = [256]bool{' ': true, '\t': true, '\r': true, '\n': true, 0: true, '{': true, '}': true, ';': true, ',': true, '"': true}

func (t *tokens) text() string {
	t.quoted = true
	s := t.rest[1:]
	if i := strings.IndexAny(s, "\"\\"); i >= 0 && s[i] == '"' {
		t.rest = s[i+1:]
		return s[:i]
	}
	var b strings.Builder
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
