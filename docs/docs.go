// Package docs holds what of the documentation the program itself writes.
package docs

import _ "embed" // for the reference file

// Environment is the reference of an environment's file.
//
//go:embed environment.yaml
var Environment []byte
