// Package v1alpha1 is flintlock's service for commands in guests, by its exact names and numbers.
package v1alpha1
