package logline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
)

var noon = time.Date(2022, 10, 28, 10, 33, 52, 123456789, time.UTC)

type secret string

func (secret) LogValue() slog.Value { return slog.StringValue("***") }

// record is one call of a log.
type record struct {
	level slog.Level
	msg   string
	args  []any
}

func (r record) write(t testing.TB, w io.Writer, f Format) {
	t.Helper()
	made := slog.NewRecord(noon, r.level, r.msg, 0)
	made.Add(r.args...)
	if err := New(w, f, Trace).Handler().Handle(t.Context(), made); err != nil {
		t.Errorf("%q: %v", r.msg, err)
	}
}

// TestLines has lines of flintlock's journal, and each rule by which a value is quoted.
func TestLines(t *testing.T) {
	for _, c := range []struct {
		record
		text, json string
	}{
		{
			record{slog.LevelInfo, "starting microvm controller", []any{"controller", "microvm"}},
			`time="2022-10-28T10:33:52Z" level=info msg="starting microvm controller" controller=microvm`,
			`{"controller":"microvm","level":"info","msg":"starting microvm controller","time":"2022-10-28T10:33:52Z"}`,
		}, {
			record{Trace, "querying all microvms: map[Namespace:]", []any{"controller", "microvm", "component", "app"}},
			`time="2022-10-28T10:33:52Z" level=trace msg="querying all microvms: map[Namespace:]" component=app controller=microvm`,
			`{"component":"app","controller":"microvm","level":"trace","msg":"querying all microvms: map[Namespace:]","time":"2022-10-28T10:33:52Z"}`,
		}, {
			record{slog.LevelWarn, "TLS is DISABLED", nil},
			`time="2022-10-28T10:33:52Z" level=warning msg="TLS is DISABLED"`,
			`{"level":"warning","msg":"TLS is DISABLED","time":"2022-10-28T10:33:52Z"}`,
		}, {
			record{slog.LevelDebug, "serving...", []any{"address", "/run/containerd/containerd.sock", "a", "", "b", "a=b", "c", `"`, "d", "ü", "e", "x\ny", "f", "a-b._/@^+Z9"}},
			`time="2022-10-28T10:33:52Z" level=debug msg=serving... a= address=/run/containerd/containerd.sock b="a=b" c="\"" d="ü" e="x\ny" f=a-b._/@^+Z9`,
			`{"a":"","address":"/run/containerd/containerd.sock","b":"a=b","c":"\"","d":"ü","e":"x\ny","f":"a-b._/@^+Z9","level":"debug","msg":"serving...","time":"2022-10-28T10:33:52Z"}`,
		}, {
			record{slog.LevelError, "", []any{"err", errors.New("open x: it is not there"), "none", nil, "took", 1500 * time.Millisecond, "pid", 7, "ok", true, "token", secret("s"), "ip", netip.MustParseAddr("10.0.0.1")}},
			`time="2022-10-28T10:33:52Z" level=error err="open x: it is not there" ip=10.0.0.1 none="<nil>" ok=true pid=7 token="***" took=1.5s`,
			`{"err":"open x: it is not there","ip":"10.0.0.1","level":"error","msg":"","none":null,"ok":true,"pid":7,"time":"2022-10-28T10:33:52Z","token":"***","took":1500000000}`,
		}, {
			record{slog.LevelInfo, "x", []any{"msg", "m", "level", 1, "time", 2, "g", slog.GroupValue(slog.Int("a", 1), slog.Int("b", 2)), "twice", 1, "twice", 2}},
			`time="2022-10-28T10:33:52Z" level=info msg=x fields.level=1 fields.msg=m fields.time=2 g.a=1 g.b=2 twice=2`,
			`{"fields.level":1,"fields.msg":"m","fields.time":2,"g.a":1,"g.b":2,"level":"info","msg":"x","time":"2022-10-28T10:33:52Z","twice":2}`,
		},
	} {
		for f, want := range map[Format]string{Text: c.text, JSON: c.json} {
			var b strings.Builder
			c.write(t, &b, f)
			if got := b.String(); got != want+"\n" {
				t.Errorf("%s\n got %s\nwant %s", f, got, want)
			}
		}
	}
}

// likeLogrus has logrus itself write a record, which flintlock does.
func likeLogrus(t testing.TB, r record, f logrus.Formatter) string {
	t.Helper()
	log := logrus.New()
	log.SetLevel(logrus.TraceLevel)
	entry := logrus.NewEntry(log)
	entry.Time, entry.Message = noon, r.msg
	entry.Level = map[slog.Level]logrus.Level{
		Trace: logrus.TraceLevel, slog.LevelDebug: logrus.DebugLevel, slog.LevelInfo: logrus.InfoLevel,
		slog.LevelWarn: logrus.WarnLevel, slog.LevelError: logrus.ErrorLevel,
	}[r.level]
	for i := 0; i < len(r.args); i += 2 {
		entry.Data[r.args[i].(string)] = r.args[i+1]
	}
	b, err := f.Format(entry)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// FuzzLikeLogrus: whatever is logged, the line is logrus' to the byte.
func FuzzLikeLogrus(f *testing.F) {
	f.Add("starting", "key", "value", int64(1))
	f.Add("", "msg", "a b", int64(-1))
	f.Add("x\x00\xff", "level", "\xffü\u2028<>&", int64(1<<40))
	f.Fuzz(func(t *testing.T, msg, key, value string, n int64) {
		if key == "other" || key == "took" || key == "err" { // logrus' map has one of a name, in no order
			return
		}
		for _, level := range []slog.Level{Trace, slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			r := record{level, msg, []any{key, value, "other", n, "took", time.Duration(n), "err", errors.New(value)}}
			for format, theirs := range map[Format]logrus.Formatter{Text: &logrus.TextFormatter{DisableColors: true}, JSON: &logrus.JSONFormatter{}} {
				var b bytes.Buffer
				r.write(t, &b, format)
				if want := likeLogrus(t, r, theirs); b.String() != want {
					t.Errorf("%s\n got %q\nwant %q", format, b.String(), want)
				}
			}
		}
	})
}

// none is an error that panics if it is asked what it says, as one of a nil pointer does.
type none struct{ text string }

func (n *none) Error() string { return n.text }

// What JSON has no form for costs neither the line nor the daemon.
func TestJSONOfWhatItCannotShow(t *testing.T) {
	for name, c := range map[string]struct {
		v    any
		want string
	}{
		"not a number":       {math.NaN(), `"NaN"`},
		"map of anything":    {map[any]any{1: 2}, `"map[1:2]"`},
		"error that is none": {error((*none)(nil)), `"\u003cnil\u003e"`},
	} {
		var b strings.Builder
		New(&b, JSON, slog.LevelInfo).Info("x", "ok", true, "v", c.v)
		if !strings.Contains(b.String(), `"ok":true,`) || !strings.HasSuffix(b.String(), `"v":`+c.want+"}\n") {
			t.Errorf("%s: %q", name, b.String())
		}
	}
}

func TestLevelAndParts(t *testing.T) {
	var b strings.Builder
	log := New(&b, Text, slog.LevelInfo)
	with := log.With("controller", "microvm")
	with.Debug("not this")
	with.With("uid", "01K").Info("one")
	with.WithGroup("g").With("a", 1).WithGroup("").Info("two", "b", 2)
	log.Info("three")
	var got []string
	for line := range strings.Lines(b.String()) {
		_, rest, _ := strings.Cut(line, " level=info ")
		got = append(got, strings.TrimSpace(rest))
	}
	want := []string{"msg=one controller=microvm uid=01K", "msg=two controller=microvm g.a=1 g.b=2", "msg=three"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// writes counts writes, and wants a line in each.
type writes struct {
	t *testing.T
	n int
}

func (w *writes) Write(p []byte) (int, error) {
	w.n++ // the race detector sees two at a time
	if bytes.Count(p, []byte("\n")) != 1 || p[len(p)-1] != '\n' {
		w.t.Errorf("no line: %q", p)
	}
	return len(p), nil
}

func TestLinesAreWhole(t *testing.T) {
	w := &writes{t: t}
	log := New(w, Text, slog.LevelInfo)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range 100 {
				log.LogAttrs(context.WithoutCancel(t.Context()), slog.LevelInfo, "line", slog.Int("n", i))
			}
		})
	}
	all.Wait()
	if w.n != 800 {
		t.Errorf("%d lines", w.n)
	}
}
