// Package v1alpha1 is flintlock's service MicroVM, by its exact names and numbers.
package v1alpha1
