package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"ingot/api/types"
	"ingot/internal/inspect"
)

func TestArguments(t *testing.T) {
	for _, c := range []struct{ argv, want string }{
		{"/usr/bin/ingot ps -o json", "ps -o json"},
		{"flintlockd run --config x --bridge-name br0", "run --config x --bridge-name br0"},
		{"flintlockd", "run --help"},
		{"flintlockd --help", "run --help"},
		{"/usr/local/bin/flintlockd version", "version"},
		{"ctr -n flintlock images ls", "ctr -n flintlock images ls"},
		{"dhcp-lease-list", "dhcp-lease-list"},
		{"./dhcp-leases-list --parsable", "dhcp-lease-list --parsable"},
	} {
		if got := strings.Join(arguments(strings.Fields(c.argv)), " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.argv, got, c.want)
		}
	}
}

func TestPick(t *testing.T) {
	h := &hostClient{Machine: inspect.Machine{Name: "host-0"}}
	newVM := func(namespace, name, uid string) microVM {
		return microVM{&types.MicroVM{Spec: &types.MicroVMSpec{Namespace: namespace, Id: name, Uid: &uid}}, h}
	}
	all := []microVM{
		newVM("default", "a", "01AAAA1"), newVM("default", "b", "01AAAA2"),
		newVM("team", "a", "01BBBB1"), newVM("team", "c", "01BBBB2"), newVM("x", "c", "01CCCC1"), newVM("x", "01dd", "01EEEE1"),
	}
	for _, c := range []struct{ name, want string }{
		{"a", "01AAAA1"},
		{"default/a", "01AAAA1"},
		{"team/a", "01BBBB1"},
		{"01bbbb1", "01BBBB1"},
		{"01CC", "01CCCC1"},
		{"01dd", "01EEEE1"}, // a name comes before the beginning of a uid
		{"c", "find microVM c: invalid argument: it could be team/c 01BBBB2 on host-0, or x/c 01CCCC1 on host-0"},
		{"01AAAA", "find microVM 01AAAA: invalid argument: it could be default/a 01AAAA1 on host-0, or default/b 01AAAA2 on host-0"},
		{"01C", "find microVM 01C: not found; `ingot ps` shows what there is"}, // too short
		{"team/b", "find microVM team/b: not found; `ingot ps` shows what there is"},
		{"", "find microVM : not found; `ingot ps` shows what there is"},
	} {
		vm, err := pick(all, c.name)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = vm.uid()
		}
		if got != c.want {
			t.Errorf("%q: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestFreeName(t *testing.T) {
	taken := map[string]bool{}
	for range len(firstWords)*len(secondWords) + 5 { // more than there are pairs
		name := freeName(taken)
		if taken[name] {
			t.Fatalf("%s is taken", name)
		}
		taken[name] = true
	}
}

func TestLineStart(t *testing.T) {
	for _, c := range []struct {
		data string
		n    int
		want int
	}{
		{"a\nb\nc\n", 1, 4},
		{"a\nb\nc", 1, 4},
		{"a\nb\nc\n", 2, 2},
		{"a\nb\nc\n", 3, -1}, // whether the first line is whole cannot be known
		{"a\n\n", 1, 2},
		{"a\n", 0, 2},
		{"", 1, -1},
		{"", 0, 0},
	} {
		if got := lineStart([]byte(c.data), c.n); got != c.want {
			t.Errorf("%q, %d lines: %d, want %d", c.data, c.n, got, c.want)
		}
	}
}

func TestTransferred(t *testing.T) {
	for _, c := range []struct {
		offset, total int64
		want          string
	}{
		{0, 0, ""}, {2_500_000, 0, "2.5 MB"}, {2_500_000, 10_000_000, "2.5/10.0 MB 25 %"}, {11_000_000, 10_000_000, "11.0/10.0 MB 100 %"},
	} {
		if got := transferred(c.offset, c.total); got != c.want {
			t.Errorf("%d of %d: %q, want %q", c.offset, c.total, got, c.want)
		}
	}
}

// A hint is right to paste into the shell that it is shown in.
func TestHints(t *testing.T) {
	const text = "it is down: `ingot up` brings it up, `ingot vm get a` or `sudo ingot down`; ingot `x`"
	for _, c := range []struct{ usual, name, want string }{
		{"", "lab", text},
		{"", "two", "it is down: `ingot --env two up` brings it up, `ingot --env two vm get a` or `sudo ingot --env two down`; ingot `x`"},
		{"two", "two", "it is down: `ingot up` brings it up, `ingot vm get a` or `sudo ingot --env two down`; ingot `x`"},
		{"two", "lab", "it is down: `ingot --env lab up` brings it up, `ingot --env lab vm get a` or `sudo ingot down`; ingot `x`"},
	} {
		t.Setenv("INGOT_ENV", c.usual)
		if d := cmp.Diff(c.want, pasteable(text, c.name)); d != "" {
			t.Errorf("%+v: %s", c, d)
		}
		if d := cmp.Diff(c.want, explain(errors.New(text), c.name)); d != "" {
			t.Errorf("%+v: %s", c, d)
		}
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("create default/a on host-0: %w", status.Error(codes.InvalidArgument, "vcpu: 99 is more than 64")),
			"create default/a on host-0: vcpu: 99 is more than 64"},
		{errors.Join(fmt.Errorf("host-0: %w", status.Error(codes.Unavailable, "connection refused")), errors.New("host-1: gone")),
			"host-0: connection refused; host-1: gone"},
		{fmt.Errorf("list leases: %w", status.Error(codes.Unauthenticated, "the token is wrong")),
			"list leases: the token is wrong (the environment's certificates or token have changed; `ingot up` renews them)"},
		{fmt.Errorf("find lease x: %w", errdefs.ErrNotFound), "find lease x: not found"},
		{status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 192.168.10.3:9090: i/o timeout"`),
			"dial tcp 192.168.10.3:9090: i/o timeout"},
		{errors.New("a\n  b"), "a; b"},
	} {
		if diff := cmp.Diff(c.want, explain(c.err, usualEnvironment())); diff != "" {
			t.Error(diff)
		}
	}
}
