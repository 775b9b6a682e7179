package doctor

import (
	"fmt"
	"io"
	"strings"
)

// Text writes the report: a line a check, and below what is wrong what it breaks
// and what mends it.
func (r Report) Text(w io.Writer) error {
	var b strings.Builder
	width := 0
	for _, f := range r.Checks {
		width = max(width, len(f.Name))
	}
	counts := map[Status]int{}
	for _, f := range r.Checks {
		counts[f.Status]++
		fmt.Fprintf(&b, "%s  %-*s  %s\n", f.Status, width, f.Name, f.Detail)
		if !f.Wrong() {
			continue
		}
		fix := f.Fix
		if f.Fixable {
			fix += " (or: `ingot doctor --fix " + f.Name + "`)"
		}
		fmt.Fprintf(&b, "      %-*s  breaks: %s\n      %-*s  fix:    %s\n", width, "", f.Breaks, width, "", fix)
	}
	end := "nothing stops `ingot up`"
	if !r.OK {
		end = "`ingot up` will not work"
	}
	fmt.Fprintf(&b, "\n%d pass, %d warn, %d fail, %d skip: %s\n", counts[Pass], counts[Warn], counts[Fail], counts[Skip], end)
	_, err := io.WriteString(w, b.String())
	return err
}
