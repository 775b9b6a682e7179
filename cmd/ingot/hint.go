package main

import (
	"io"
	"strings"

	"ingot/internal/env"
)

// A hint names a command in backquotes, `ingot up`, wherever it is written. Only
// here is it known which environment is meant, and what the person's shell says of
// that.

// program is how ingot is called for an environment.
func program(name string) string {
	if name == usualEnvironment() {
		return "ingot"
	}
	return "ingot --env " + name
}

// pasteable makes the hints of a text commands that are about the environment.
func pasteable(text, name string) string {
	sudo := "ingot"
	if name != env.DefaultName { // sudo drops $INGOT_ENV
		sudo += " --env " + name
	}
	return strings.NewReplacer("`ingot ", "`"+program(name)+" ", "`sudo ingot ", "`sudo "+sudo+" ").Replace(text)
}

// hints writes what people read, a line or more at a time, with pasteable hints.
type hints struct {
	w    io.Writer
	name string
}

func (h hints) Write(p []byte) (int, error) {
	if _, err := io.WriteString(h.w, pasteable(string(p), h.name)); err != nil {
		return 0, err
	}
	return len(p), nil
}
