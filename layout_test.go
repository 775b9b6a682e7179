// Package ingot_test holds the repository to LAYOUT.
package ingot_test

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "ingot/"

// listed is a package as `go list` shows it; its own name without the module.
type listed struct {
	name, doc string
	imports   []string
}

// layout is the file LAYOUT.
type layout struct {
	grants map[string][]string // by package: ours that it may import
	doors  map[string][]string // by import prefix: packages that may import it
}

func TestLayout(t *testing.T) {
	f, err := os.Open("LAYOUT")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := readLayout(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, objection := range l.objections(goList(t)) {
		t.Error(objection)
	}
}

// TestObjections is why TestLayout can be believed: it objects where it should.
func TestObjections(t *testing.T) {
	l, err := readLayout(strings.NewReader(`
# a comment
cmd/x: * # the program
api: # messages
api/v1: # messages
internal/a: internal/b # uses b and the wire
internal/b: # alone
internal/gone: # was removed
only net/http: internal/b # the door
`))
	if err != nil {
		t.Fatal(err)
	}
	got := l.objections([]listed{
		{"cmd/x", "Command x.", []string{"ingot/internal/a", "ingot/internal/b"}},
		{"api", "", nil},
		{"api/v1", "Package api.", nil},
		{"internal/a", "Package a.", []string{"ingot/internal/b", "ingot/api/v1", "net/http", "net/http/httptest", "net"}},
		{"internal/b", "Package b.", []string{"net/http"}},
		{"internal/util", "Package util.", nil},
	})
	want := []string{
		"api has no package comment",
		"internal/a imports ingot/api/v1, which LAYOUT does not grant",
		`internal/a imports net/http, which LAYOUT keeps to ["internal/b"]`,
		`internal/a imports net/http/httptest, which LAYOUT keeps to ["internal/b"]`,
		"internal/util is not in LAYOUT: add a line that says what it is for",
		"LAYOUT names internal/gone, which does not exist",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestReadLayoutObjects(t *testing.T) {
	for text, want := range map[string]string{
		"internal/a: internal/b\n":             "line 1: there is no # that says what it is for",
		"internal/a # what\n":                  "line 1: there is no colon",
		"\ninternal/a: # x\ninternal/a: # x\n": "line 3: internal/a is here twice",
	} {
		if _, err := readLayout(strings.NewReader(text)); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		pattern, pkg string
		want         bool
	}{
		{"api/...", "api", true},
		{"api/...", "api/types", true},
		{"api/...", "apis", false},
		{"internal/image", "internal/image/build", false},
		{"*", "internal/image", true},
	} {
		if got := covers(c.pattern, c.pkg); got != c.want {
			t.Errorf("covers(%q, %q) = %v", c.pattern, c.pkg, got)
		}
	}
}

func readLayout(r io.Reader) (layout, error) {
	l := layout{grants: map[string][]string{}, doors: map[string][]string{}}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		rule, purpose, _ := strings.Cut(line, "#")
		if strings.TrimSpace(purpose) == "" {
			return l, fmt.Errorf("line %d: there is no # that says what it is for", n)
		}
		name, rest, ok := strings.Cut(rule, ":")
		if !ok {
			return l, fmt.Errorf("line %d: there is no colon", n)
		}
		into := l.grants
		if prefix, ok := strings.CutPrefix(name, "only "); ok {
			into, name = l.doors, prefix
		}
		if _, ok := into[name]; ok {
			return l, fmt.Errorf("line %d: %s is here twice", n, name)
		}
		into[name] = strings.Fields(rest)
	}
	return l, lines.Err()
}

// objections says all that is wrong with packages, in their order.
func (l layout) objections(packages []listed) []string {
	var found []string
	object := func(format string, a ...any) { found = append(found, fmt.Sprintf(format, a...)) }
	for _, p := range packages {
		granted, ok := l.grants[p.name]
		if !ok {
			object("%s is not in LAYOUT: add a line that says what it is for", p.name)
			continue
		}
		if p.doc == "" {
			object("%s has no package comment", p.name)
		}
		for _, imp := range p.imports {
			if ours, ok := strings.CutPrefix(imp, module); ok && !anyCovers(granted, ours) {
				object("%s imports %s, which LAYOUT does not grant", p.name, imp)
			}
			for prefix, users := range l.doors {
				if strings.HasPrefix(imp, prefix) && !anyCovers(users, p.name) {
					object("%s imports %s, which LAYOUT keeps to %q", p.name, imp, users)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.grants)) {
		if !slices.ContainsFunc(packages, func(p listed) bool { return p.name == name }) {
			object("LAYOUT names %s, which does not exist", name)
		}
	}
	return found
}

func anyCovers(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return covers(p, pkg) })
}

func covers(pattern, pkg string) bool {
	if above, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == above || strings.HasPrefix(pkg, above+"/")
	}
	return pattern == "*" || pattern == pkg
}

// goList is all packages but the root, which holds only this test. Imports of
// test files are not looked at: tests may use anything.
func goList(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-f", `{{.ImportPath}}|{{.Doc}}|{{join .Imports " "}}`, "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []listed
	for line := range strings.Lines(string(out)) {
		path, rest, _ := strings.Cut(strings.TrimSpace(line), "|")
		end := strings.LastIndex(rest, "|") // a comment may have a bar in it
		if name, ok := strings.CutPrefix(path, module); ok {
			packages = append(packages, listed{name, rest[:end], strings.Fields(rest[end+1:])})
		}
	}
	return packages
}
