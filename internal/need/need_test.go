package need

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// recorder is a testing.TB that remembers how it was ended.
type recorder struct {
	testing.TB
	how string
}

func (r *recorder) Helper()           {}
func (r *recorder) Skip(args ...any)  { r.end("skip: ", args) }
func (r *recorder) Fatal(args ...any) { r.end("fatal: ", args) }
func (r *recorder) end(h string, a []any) {
	r.how = h + fmt.Sprint(a...)
	runtime.Goexit()
}

// ended runs f as a test and says how it ended.
func ended(f func(testing.TB)) string {
	r := &recorder{how: "passed"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r.how
}

func TestLack(t *testing.T) {
	missing := errors.New("there is none")
	for _, c := range []struct {
		env, what string
		err       error
		want      string
	}{
		{"", "loop", nil, "passed"},
		{"", "loop", missing, "skip: this test needs loop: there is none"},
		{"all", "loop", missing, "fatal: this test needs loop: there is none"},
		{"all", "cgroup2", missing, "skip: this test needs cgroup2: there is none"},
		{"all", "cgroup2", nil, "passed"},
	} {
		t.Setenv("INGOT_NEED", c.env)
		if got := ended(func(t testing.TB) { lack(t, c.what, c.err) }); got != c.want {
			t.Errorf("INGOT_NEED=%q, %s, %v: %s, want %s", c.env, c.what, c.err, got, c.want)
		}
	}
}

func TestBinary(t *testing.T) {
	t.Setenv("INGOT_NEED", "")
	if got := ended(func(t testing.TB) { Binary(t, "sh") }); got != "passed" {
		t.Errorf("sh: %s", got)
	}
	if got := ended(func(t testing.TB) { Binary(t, "no-such-program") }); !strings.HasPrefix(got, "skip: ") {
		t.Errorf("no-such-program: %s", got)
	}
}

// The thread that tried a namespace must not be one that goes on.
func TestNetNSLeavesTheTestWhereItWas(t *testing.T) {
	NetNS(t)
	const here = "/proc/thread-self/ns/net"
	before, err := os.Readlink(here)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := netns(); err != nil {
			t.Fatal(err)
		}
		if after, _ := os.Readlink(here); after != before {
			t.Fatalf("now in %s, was in %s", after, before)
		}
	}
}
