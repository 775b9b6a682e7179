package env

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Mistake is one mistake in a file that the user wrote. It is an
// errdefs.ErrInvalidArgument.
type Mistake struct {
	File    string
	Line    int
	Key     string // machines[1].address; empty: the file as a whole
	Problem string
}

func (m *Mistake) Error() string {
	text := m.Problem
	if m.Key != "" {
		text = m.Key + ": " + text
	}
	return fmt.Sprintf("%s:%d: %s", m.File, m.Line, text)
}

// Unwrap makes a Mistake an errdefs.ErrInvalidArgument.
func (m *Mistake) Unwrap() error { return errdefs.ErrInvalidArgument }

// refusal is a reason not to begin, of which kind says what it means to a program.
type refusal struct {
	text string
	kind error
}

func refuse(kind error, format string, a ...any) error {
	return &refusal{fmt.Sprintf(format, a...), kind}
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.kind }

// Objections are all the reasons for which something is not begun, a line each.
type Objections []error

func (o Objections) Error() string {
	var lines []string
	for _, err := range o {
		lines = append(lines, err.Error())
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.Is and errors.As look at each of them.
func (o Objections) Unwrap() []error { return o }

// err is nil if there are none.
func (o Objections) err() error {
	if len(o) == 0 {
		return nil
	}
	return o
}

// source knows where in a file a key stands.
type source struct {
	file  string
	lines map[string]int
}

// has says whether a key stands in the file.
func (s source) has(key string) bool { return s.lines[key] > 0 }

// mistake is one at a key, or where what should hold the key is.
func (s source) mistake(key, format string, a ...any) *Mistake {
	m := &Mistake{File: s.file, Line: 1, Key: key, Problem: fmt.Sprintf(format, a...)}
	for k := key; k != ""; {
		if line := s.lines[k]; line > 0 {
			m.Line = line
			break
		}
		k = k[:max(strings.LastIndexAny(k, ".["), 0)]
	}
	return m
}

// mistakes are found one after the other, and told in the order of their lines.
type mistakes struct {
	source
	all []*Mistake
}

func (m *mistakes) add(key, format string, a ...any) {
	m.all = append(m.all, m.mistake(key, format, a...))
}

func (m *mistakes) objections() Objections {
	slices.SortStableFunc(m.all, func(a, b *Mistake) int { return a.Line - b.Line })
	var o Objections
	for _, one := range m.all {
		o = append(o, one)
	}
	return o
}
