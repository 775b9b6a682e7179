package vm

import (
	"errors"
	"fmt"
	"strings"
)

// Selector is what labels must be: all of its terms hold.
type Selector []term

type term struct {
	key, value string
	absent     bool // !key
	any        bool // key
	not        bool // key!=value
}

// ParseSelector reads key=value (or ==), key!=value, key and !key with commas between
// them, as Kubernetes has them. An empty one selects everything.
func ParseSelector(text string) (Selector, error) {
	var s Selector
	var mistakes []error
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		if part == "" && text == "" {
			continue
		}
		t := parseTerm(part)
		if t.key == "" || strings.ContainsAny(t.key+t.value, "=!, ()") {
			mistakes = append(mistakes, &FieldError{Field: "selector", Problem: fmt.Sprintf("%q is none of key=value, key!=value, key, !key", part)})
		}
		s = append(s, t)
	}
	return s, errors.Join(mistakes...)
}

func parseTerm(part string) term {
	if key, value, ok := strings.Cut(part, "!="); ok {
		return term{key: strings.TrimSpace(key), value: strings.TrimSpace(value), not: true}
	}
	if key, value, ok := strings.Cut(part, "="); ok {
		return term{key: strings.TrimSpace(key), value: strings.TrimSpace(strings.TrimPrefix(value, "="))}
	}
	if key, ok := strings.CutPrefix(part, "!"); ok {
		return term{key: strings.TrimSpace(key), absent: true}
	}
	return term{key: part, any: true}
}

// Matches says whether labels are as the selector wants them. What a label that is
// not there is not equal to, key!=value, holds.
func (s Selector) Matches(labels map[string]string) bool {
	for _, t := range s {
		value, there := labels[t.key]
		ok := there && value == t.value
		switch {
		case t.absent:
			ok = !there
		case t.any:
			ok = there
		case t.not:
			ok = !ok
		}
		if !ok {
			return false
		}
	}
	return true
}
