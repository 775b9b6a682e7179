package main

import (
	"os"

	"golang.org/x/term"

	ingotv1 "ingot/api/ingot/v1"
)

// terminal is the user's, in raw mode: what is typed goes to the guest as it
// is, Ctrl-C included.
type terminal struct {
	fd    int
	state *term.State
}

// isTerminal says whether a person is at the other end of f.
func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// rawTerminal puts the terminal of standard input into raw mode. Where that is
// not a terminal there is nothing to do.
func rawTerminal() (*terminal, error) {
	t := &terminal{fd: int(os.Stdin.Fd())}
	if !isTerminal(os.Stdin) {
		return t, nil
	}
	var err error
	t.state, err = term.MakeRaw(t.fd)
	return t, err
}

// restore gives the terminal back as it was. It may be called twice.
func (t *terminal) restore() {
	if t.state != nil {
		_ = term.Restore(t.fd, t.state)
		t.state = nil
	}
}

// windowSize is the size of the user's terminal, nil if there is none.
func windowSize() *ingotv1.WindowSize {
	columns, rows, err := term.GetSize(int(os.Stdin.Fd()))
	if err != nil {
		return nil
	}
	return &ingotv1.WindowSize{Rows: uint32(rows), Columns: uint32(columns)}
}
