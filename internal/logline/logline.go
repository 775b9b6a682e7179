// Package logline writes a daemon's log in the form that flintlock's has, which is
// logrus': lines that people and their scripts know, for log/slog. It knows nothing of
// what is logged, and neither rotates nor colours.
package logline

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Trace is below slog's own levels.
const Trace = slog.LevelDebug - 4

// Format is what a line looks like.
type Format string

// The formats, by the names that --log-format has for them.
const (
	Text Format = "text"
	JSON Format = "json"
)

// Formats are all of them.
var Formats = []Format{Text, JSON}

// New makes a log that writes each record of a level or above as one line, in one
// write.
func New(w io.Writer, f Format, level slog.Level) *slog.Logger {
	return slog.New(&handler{out: &output{w: w}, format: f, level: level})
}

type output struct {
	mu sync.Mutex // guards w
	w  io.Writer
}

type handler struct {
	out    *output
	format Format
	level  slog.Level
	fields map[string]any // never changed
	prefix string         // of the keys that come: GROUP.
}

func (h *handler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h *handler) WithGroup(name string) slog.Handler {
	next := *h
	if name != "" {
		next.prefix += name + "."
	}
	return &next
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *h
	next.fields = maps.Clone(h.fields)
	if next.fields == nil {
		next.fields = map[string]any{}
	}
	for _, a := range attrs {
		put(next.fields, h.prefix, a)
	}
	return &next
}

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	fields := make(map[string]any, len(h.fields)+r.NumAttrs())
	maps.Copy(fields, h.fields)
	r.Attrs(func(a slog.Attr) bool {
		put(fields, h.prefix, a)
		return true
	})
	write := text
	if h.format == JSON {
		write = object
	}
	line, err := write(r, fields)
	if err != nil {
		return err
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err = h.out.w.Write(line)
	return err
}

// put adds an attribute; the last of a name counts. What would be taken for the line's
// own has a prefix.
func put(fields map[string]any, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, inner := range v.Group() {
			put(fields, prefix, inner)
		}
		return
	}
	if a.Equal(slog.Attr{}) {
		return
	}
	key := prefix + a.Key
	switch key {
	case "time", "level", "msg", "logrus_error":
		key = "fields." + key
	}
	fields[key] = v.Any()
}

// levelName is logrus' name of a level.
func levelName(l slog.Level) string {
	switch {
	case l < slog.LevelDebug:
		return "trace"
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warning"
	}
	return "error"
}

func text(r slog.Record, fields map[string]any) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "time=%q level=%s", r.Time.Format(time.RFC3339), levelName(r.Level))
	if r.Message != "" {
		b.WriteString(" msg=" + quote(r.Message))
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		b.WriteString(" " + key + "=" + quote(word(fields[key])))
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

func word(v any) string {
	if b, ok := v.([]byte); ok {
		return string(b)
	}
	return fmt.Sprint(v)
}

// quote puts a text in quotes that has more in it than letters, digits and a few signs.
func quote(s string) string {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case bytes.IndexByte([]byte("-._/@^+"), c) >= 0:
		default:
			return strconv.Quote(s)
		}
	}
	return s
}

func object(r slog.Record, fields map[string]any) ([]byte, error) {
	for key, v := range fields {
		if _, ok := v.(error); ok { // encoding/json shows none
			fields[key] = word(v)
		}
	}
	fields["time"], fields["level"], fields["msg"] = r.Time.Format(time.RFC3339), levelName(r.Level), r.Message
	line, err := json.Marshal(fields)
	if err != nil { // of one that JSON has no form for: the others are to be seen
		for key, v := range fields {
			if _, err := json.Marshal(v); err != nil {
				fields[key] = word(v)
			}
		}
		line, err = json.Marshal(fields)
	}
	if err != nil {
		return nil, fmt.Errorf("write a line of the log: %w", err)
	}
	return append(line, '\n'), nil
}
