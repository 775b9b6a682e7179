package agent

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
)

// A frame is a header and a payload:
//
//	magic 4 | session 4 | stream 4 | kind 1 | channel 1 | length 2 | payload's CRC 4 | header's CRC 4
//
// big-endian, CRC-32 (IEEE). A host may go in the middle of a frame, and the
// next one then finds the rest of it, and the guest finds the next host's
// frames where it expects a payload. So a reader trusts nothing but a magic
// with a right header CRC, and what follows it with a right payload CRC; where
// either is wrong it goes on one byte later.
type frame struct {
	session uint32 // made by the client; frames of other sessions are ignored
	stream  uint32
	kind    kind
	channel uint8 // of data, eof and credit
	payload []byte
}

type kind uint8

const (
	kindHello    kind = iota + 1 // client: a new session
	kindWelcome                  // server: the session's start
	kindAnnounce                 // server: there is no session, say hello
	kindOpen                     // client: a request, on a new stream
	kindData
	kindEOF
	kindCredit  // payload: 4 bytes, how much more the other side may send
	kindControl // client: signal, window size
	kindResult  // server: the stream's last frame
	kindCancel  // client: end the stream's command, or forget its end
	kindEvent
	kindAck
	kindJoined // server: the stream is a lasting command's from now on
	kindDetach // client: nobody is there for the stream's lasting command
)

const (
	stdin  = 0
	stdout = 1
	stderr = 2

	headerSize = 24
	maxPayload = 16 << 10
	// window is how many bytes of one channel may be on their way. A stream whose
	// reader stands still holds this much, and nothing else.
	window = 64 << 10
)

var magic = []byte{'I', 'n', 'g', 0x1a}

func appendFrame(b []byte, f frame) []byte {
	at := len(b)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint32(b, f.session)
	b = binary.BigEndian.AppendUint32(b, f.stream)
	b = append(b, byte(f.kind), f.channel)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.payload)))
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(f.payload))
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b[at:]))
	return append(b, f.payload...)
}

// scanner finds the frames in a stream. Its buffer grows for long frames and
// shrinks after them: a host has one for each of its microVMs, most of them idle.
type scanner struct {
	r    io.Reader
	buf  []byte
	from int // buf[from:to] is unread
	to   int
	long bool // the last frame was one
}

const (
	idleBuffer = 512
	fullBuffer = 2 * (headerSize + maxPayload)
)

// next returns the next frame. Its payload is valid until the next call. An
// error is the reader's; scanning may go on after it.
func (s *scanner) next() (frame, error) {
	for {
		f, ok := s.parse()
		if ok {
			return f, nil
		}
		if err := s.fill(); err != nil {
			return frame{}, err
		}
	}
}

// reset forgets what was read of a frame whose end will not come.
func (s *scanner) reset() { s.from, s.to = 0, 0 }

// parse returns the first whole frame in the buffer and drops what is before
// it. If there is none it keeps what may become one.
func (s *scanner) parse() (frame, bool) {
	for {
		b := s.buf[s.from:s.to]
		i := bytes.Index(b, magic)
		if i < 0 {
			s.from = max(s.from, s.to-len(magic)+1)
			return frame{}, false
		}
		s.from += i
		b = b[i:]
		if len(b) < headerSize {
			return frame{}, false
		}
		length := int(binary.BigEndian.Uint16(b[14:]))
		if length > maxPayload || crc32.ChecksumIEEE(b[:20]) != binary.BigEndian.Uint32(b[20:]) {
			s.from++
			continue
		}
		if len(b) < headerSize+length {
			return frame{}, false
		}
		payload := b[headerSize : headerSize+length]
		if crc32.ChecksumIEEE(payload) != binary.BigEndian.Uint32(b[16:]) {
			s.from++
			continue
		}
		s.from += headerSize + length
		s.long = headerSize+length > idleBuffer
		return frame{
			session: binary.BigEndian.Uint32(b[4:]),
			stream:  binary.BigEndian.Uint32(b[8:]),
			kind:    kind(b[12]),
			channel: b[13],
			payload: payload,
		}, true
	}
}

// fill reads at least one byte. The unread part is always shorter than a whole
// frame here, so there is room once it has moved to the front.
func (s *scanner) fill() error {
	unread := s.buf[s.from:s.to]
	switch {
	case len(unread) == 0 && len(s.buf) != idleBuffer && !s.long:
		s.buf = make([]byte, idleBuffer)
	case len(unread) == len(s.buf):
		s.buf = make([]byte, fullBuffer)
		fallthrough
	default:
		copy(s.buf, unread)
	}
	s.from, s.to = 0, len(unread)
	for {
		n, err := s.r.Read(s.buf[s.to:])
		s.to += n
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
