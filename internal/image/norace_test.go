//go:build !race

package image

const racing = false
