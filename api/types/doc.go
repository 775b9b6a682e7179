// Package types is flintlock.types: the messages of flintlock's API, by its
// exact names and numbers, with fields of our own from number 1000 on.
package types
