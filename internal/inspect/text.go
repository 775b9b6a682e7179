package inspect

import (
	"fmt"
	"io"
	"strings"
)

// Style is how a report is written as text.
type Style struct {
	Notes  bool // with the configuration that was checked
	Colour bool // decoration only: the words say all
}

// widest is where the details of long names stop being lined up.
const widest = 44

var colours = map[Status]string{Pass: "\x1b[32m", Warn: "\x1b[33m", Fail: "\x1b[31m", Skip: "\x1b[2m"}

// Text writes the report as an indented tree and, below it, what is not well.
func (r Report) Text(w io.Writer, s Style) error {
	var b strings.Builder
	width := 0
	walk(r.Checks, nil, func(c Check, path []string) {
		if n := 2*len(path) + len(c.Name); n <= widest {
			width = max(width, n)
		}
	})
	counts := map[Status]int{}
	walk(r.Checks, nil, func(c Check, path []string) {
		if len(c.Children) == 0 && (c.Status == Pass || c.Status == Skip) {
			counts[c.Status]++
		}
		indent := strings.Repeat("  ", len(path))
		line := fmt.Sprintf("%s  %-*s  %s", s.status(c.Status), width, indent+c.Name, c.Detail)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
		if !s.Notes {
			return
		}
		for _, note := range c.Notes {
			b.WriteString(strings.TrimRight("      "+indent+"  | "+note, " ") + "\n")
		}
	})
	found := r.Findings() // headings are no more than their findings
	for _, line := range found {
		status, _, _ := strings.Cut(line, ":")
		counts[Status(status)]++
	}
	fmt.Fprintf(&b, "\n%s: %d pass, %d warn, %d fail, %d skip, in %.2f s\n", r.Environment,
		counts[Pass], counts[Warn], counts[Fail], counts[Skip], r.Took.Seconds())
	for _, line := range found {
		b.WriteString(line + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Findings names each check that failed or warns, by its path, and says why.
// Headings are left out: what is under them is the finding.
func (r Report) Findings() []string {
	var lines []string
	walk(r.Checks, nil, func(c Check, path []string) {
		if c.Status != Fail && c.Status != Warn {
			return
		}
		for _, child := range c.Children {
			if child.Status == c.Status {
				return
			}
		}
		name := strings.Join(append(path[:len(path):len(path)], c.Name), " > ")
		lines = append(lines, fmt.Sprintf("%s: %s: %s", c.Status, name, c.Detail))
	})
	return lines
}

// status is a status in a column of its own width.
func (s Style) status(st Status) string {
	if !s.Colour {
		return string(st)
	}
	return colours[st] + string(st) + "\x1b[0m"
}

// walk calls f for each check, parents first, with the names above it.
func walk(checks []Check, path []string, f func(Check, []string)) {
	for _, c := range checks {
		f(c, path)
		walk(c.Children, append(path[:len(path):len(path)], c.Name), f)
	}
}
