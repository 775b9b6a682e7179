//go:build race

package image

// racing: this program has the race detector's memory beside its own.
const racing = true
