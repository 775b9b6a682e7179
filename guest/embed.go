// Package guest holds the program that runs inside microVMs as their init and
// agent, built from guest/init before this package is. It owns the embedded
// file and does not know what is in it; the program itself is package main of
// guest/init.
package guest

import (
	"embed"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"
)

// What is in bin is built, but for a placeholder, without which a fresh clone
// would not compile.
//
//go:embed all:bin
var bin embed.FS

// Init is the guest's program, a static executable.
func Init() ([]byte, error) {
	b, err := fs.ReadFile(bin, "bin/init")
	if err != nil {
		return nil, fmt.Errorf("read the guest's init: this ingot was built without it, use make build: %w", errdefs.ErrFailedPrecondition)
	}
	return b, nil
}
