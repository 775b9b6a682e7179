package dns

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// What stands in messages (RFC 1035, RFC 6891).
const (
	headerSize   = 12
	maxMessage   = 65535
	usualMessage = 512  // the most over UDP, where a client says nothing else
	ourSize      = 1232 // of an answer over UDP that arrives in one piece everywhere
	optSize      = 11
	mostName     = 255

	flagResponse           = 1 << 15
	flagAuthoritative      = 1 << 10
	flagTruncated          = 1 << 9
	flagRecursionDesired   = 1 << 8
	flagRecursionAvailable = 1 << 7
	flagAuthentic          = 1 << 5
	flagCheckingDisabled   = 1 << 4
	maskOpcode             = 15 << 11
	maskCode               = 15
	flagDNSSEC             = 1 << 15 // in OPT

	typeA   = 1
	typeNS  = 2
	typeSOA = 6
	typePTR = 12
	typeOPT = 41
	ixfr    = 251
	axfr    = 252
	typeANY = 255
	classIN = 1
)

// Codes of answers.
const (
	success        = 0
	formatError    = 1
	serverFailure  = 2
	nameError      = 3
	notImplemented = 4
	refused        = 5
	badVersion     = 16
)

// question is a message that asks, as it came. It is used again for the next one.
type question struct {
	message []byte
	from    netip.AddrPort
	flags   uint16
	end     int    // of the question in the message; at least the header's
	key     []byte // what answers depend on: the question in lower case, DO and CD
	edns    bool
	dnssec  bool
	size    int // how much the client takes over UDP
	limit   int // and how much it takes as it has asked
	mistake int // the code of the answer, if there can be no better one
}

// read takes a message, and says whether it can be answered at all.
func (q *question) read(message []byte) bool {
	*q = question{message: message, key: q.key[:0], end: headerSize, size: usualMessage}
	if len(message) < headerSize {
		return false
	}
	be := binary.BigEndian
	if q.flags = be.Uint16(message[2:]); q.flags&flagResponse != 0 {
		return false
	}
	if q.flags&maskOpcode != 0 {
		q.mistake = notImplemented
		return true
	}
	q.mistake = formatError
	if be.Uint16(message[4:]) != 1 || be.Uint32(message[6:]) != 0 {
		return true
	}
	at := headerSize
	for {
		if at >= len(message) || message[at] > 63 || at-headerSize > mostName {
			return true
		}
		if message[at] == 0 {
			at++
			break
		}
		at += 1 + int(message[at])
	}
	if at-headerSize > mostName || at+4 > len(message) {
		return true
	}
	q.end = at + 4
	q.key = append(q.key, message[headerSize:q.end]...)
	lower(q.key[:len(q.key)-4])
	q.mistake = q.extra(message[q.end:], int(be.Uint16(message[10:])))
	if kind := q.kind(); q.mistake == success && (kind == ixfr || kind == axfr) {
		q.mistake = refused
	}
	cd := byte(q.flags & flagCheckingDisabled)
	if q.dnssec {
		cd |= 1
	}
	q.key = append(q.key, cd)
	return true
}

// extra reads EDNS from what follows the question, and says what is wrong. What the client
// has to say beside it changes nothing.
func (q *question) extra(b []byte, count int) int {
	for ; count > 0; count-- {
		name := skipName(b)
		if name < 0 || name+10 > len(b) {
			return formatError
		}
		r := b[name:]
		size := 10 + int(binary.BigEndian.Uint16(r[8:]))
		if size > len(r) {
			return formatError
		}
		if binary.BigEndian.Uint16(r) == typeOPT {
			if q.edns || name != 1 {
				return formatError
			}
			q.edns = true
			q.size = min(max(usualMessage, int(binary.BigEndian.Uint16(r[2:]))), ourSize)
			q.dnssec = binary.BigEndian.Uint16(r[6:])&flagDNSSEC != 0
			if r[5] != 0 {
				return badVersion
			}
		}
		b = r[size:]
	}
	return success
}

// skipName is where a name ends that begins b; -1: nowhere.
func skipName(b []byte) int {
	for at := 0; at < len(b); {
		switch n := int(b[at]); {
		case n == 0:
			return at + 1
		case n >= 0xc0 && at+2 <= len(b):
			return at + 2
		case n > 63:
			return -1
		default:
			at += 1 + n
		}
	}
	return -1
}

// lower makes the letters of a name small. Lengths of labels are no letters.
func lower(name []byte) {
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			name[i] = c + 'a' - 'A'
		}
	}
}

func (q *question) kind() uint16 { return binary.BigEndian.Uint16(q.message[q.end-4:]) }

func (q *question) class() uint16 { return binary.BigEndian.Uint16(q.message[q.end-2:]) }

// name is the name that is asked for, in lower case, as in a message.
func (q *question) name() []byte { return q.key[:q.end-headerSize-4] }

// text is the name as people write it, without the last dot. What stands in no name of
// ours is not told apart.
func (q *question) text() string {
	var b strings.Builder
	for name := q.name(); name[0] != 0; name = name[1+name[0]:] {
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		for _, c := range name[1 : 1+name[0]] {
			if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
				c = '?'
			}
			b.WriteByte(c)
		}
	}
	return b.String()
}

// isShort says whether the name is one label, and so may be the environment's tomorrow.
func (q *question) isShort() bool {
	name := q.name()
	return name[0] != 0 && name[1+name[0]] == 0
}

// clone is a question that may be kept.
func (q *question) clone() *question {
	c := *q
	c.message, c.key = slices.Clone(q.message[:q.end]), slices.Clone(q.key)
	return &c
}

// head appends the header and the question.
func (q *question) head(b []byte, flags uint16) []byte {
	start := len(b)
	b = append(b, q.message[:q.end]...)
	h := b[start:]
	binary.BigEndian.PutUint16(h[2:], flags|flagResponse|flagRecursionAvailable|q.flags&(maskOpcode|flagRecursionDesired|flagCheckingDisabled))
	clear(h[4:headerSize])
	if q.end > headerSize {
		h[5] = 1
	}
	return b
}

// opt appends EDNS to a message that begins at start, if the client speaks it.
func (q *question) opt(b []byte, start, code int) []byte {
	if !q.edns {
		return b
	}
	var flags byte
	if q.dnssec {
		flags = flagDNSSEC >> 8
	}
	count := b[start+10 : start+12]
	binary.BigEndian.PutUint16(count, binary.BigEndian.Uint16(count)+1)
	return append(b, 0, 0, typeOPT, ourSize>>8, ourSize&0xff, byte(code>>4), 0, flags, 0, 0, 0)
}

// fail appends an answer that has only a code.
func (q *question) fail(b []byte, code int) []byte {
	start := len(b)
	return q.opt(q.head(b, uint16(code&maskCode)), start, code)
}

// answer is one that can be given to whoever asks the same.
type answer struct {
	key   string
	flags uint16 // of the header
	count [6]byte
	body  []byte   // what follows the question, but for EDNS
	ttls  []uint16 // where in body there are times to live, in seconds after at
	at    time.Time
	until time.Time // it is not to be given later
}

// answer appends an answer.
func (q *question) answer(b []byte, a *answer, now time.Time) []byte {
	start := len(b)
	flags := a.flags
	if !q.dnssec && q.flags&flagAuthentic == 0 {
		flags &^= flagAuthentic // who does not ask for it may not know it (RFC 6840, section 5.7)
	}
	size := q.end + len(a.body)
	if q.edns {
		size += optSize
	}
	if size > q.limit {
		return q.opt(q.head(b, flags|flagTruncated), start, 0)
	}
	b = q.head(b, flags)
	copy(b[start+6:], a.count[:])
	body := len(b)
	b = append(b, a.body...)
	if age := uint32(max(now.Sub(a.at), 0) / time.Second); age > 0 {
		for _, at := range a.ttls {
			ttl := b[body+int(at):]
			binary.BigEndian.PutUint32(ttl, binary.BigEndian.Uint32(ttl)-min(age, binary.BigEndian.Uint32(ttl)))
		}
	}
	return q.opt(b, start, 0)
}
