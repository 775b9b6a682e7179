package main

import (
	"ingot/internal/env"
	images "ingot/internal/image/build"
)

// environmentRegistry is an environment's registry, with the credentials of the
// machine that brought it up.
func environmentRegistry(name string) (images.Registry, error) {
	e, err := env.Open(name)
	if err != nil {
		return images.Registry{}, err
	}
	token, err := e.Token()
	if err != nil {
		return images.Registry{}, err
	}
	return images.Registry{Address: e.RegistryAddress(), CAFile: e.CAFile(), User: "ingot", Password: string(token)}, nil
}
