package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	images "ingot/internal/image/build"
)

// environmentRegistry is an environment's registry, with the credentials of the
// machine that brought it up.
func environmentRegistry(env string) (images.Registry, error) {
	dir := filepath.Join("/var/lib/ingot", env)
	token, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil {
		return images.Registry{}, fmt.Errorf("open environment %s: %w", env, err)
	}
	return images.Registry{
		Address:  "192.168.10.2:5000",
		CAFile:   filepath.Join(dir, "client", "ca.pem"),
		User:     "ingot",
		Password: strings.TrimSpace(string(token)),
	}, nil
}
