package pool

import (
	"testing"

	"ingot/internal/need"
)

// needs asks for what every test with a pool wants, and for programs.
func needs(t testing.TB, programs ...string) {
	t.Helper()
	need.Root(t)
	need.Loop(t)
	for _, p := range programs {
		need.Binary(t, p)
	}
}
